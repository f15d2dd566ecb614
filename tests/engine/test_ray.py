"""The Ray backend on a cluster of this machine; skips where the extra is not installed."""

from __future__ import annotations

import pytest

from trialist.engine.backends import RayTasks
from trialist.engine.execute import execute


def test_asking_for_ray_without_it_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"trialist\[ray\]"):
        RayTasks("local", 1, 1)


@pytest.mark.slow
def test_runs_on_ray_equal_runs_in_local_processes(coins, tmp_path):
    pytest.importorskip("ray")
    from tests.engine.test_execution import outcomes, start, work_through

    ledger, tasks = start(crash="old")
    execute(ledger, tasks, RayTasks("local", 2, 1), lambda event: None)
    on_ray = outcomes(ledger)
    assert {row["error"] for row in ledger.rows(status="failed")} == {"RuntimeError: the coin rolled under the sofa"}
    ledger.path.rename(tmp_path / "ray.db")
    ledger, tasks = start(crash="old")
    work_through(ledger, tasks)
    assert outcomes(ledger) == on_ray
