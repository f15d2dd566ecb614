from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from trialist.engine.contract import Arm
from trialist.engine.identity import canonical_json, inputs_by_content, run_identity, source_digest
from trialist.engine.registry import load_trial


@dataclass(frozen=True)
class Knob:
    size: int = 3


def test_canonical_json_ignores_the_order_of_keys_and_knows_frozen_dataclasses():
    assert canonical_json({"b": 1, "a": Knob()}) == canonical_json({"a": Knob(3), "b": 1})
    assert canonical_json({"a": Knob(4)}) != canonical_json({"a": Knob(3)})


def test_canonical_json_refuses_what_it_cannot_write_exactly():
    with pytest.raises(ValueError, match="scalars"):
        canonical_json({"a": object()})
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def test_identity_follows_the_content_of_a_file_and_not_its_name(coins, tmp_path):
    cls = load_trial("coins")
    arm = Arm("fair", "control")
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("0.5")
    second.write_text("0.5")

    def identity(path: Path, **changes) -> str:
        trial = cls(data=str(path), **changes)
        return run_identity("coins", trial, inputs_by_content(trial), arm, 0)

    assert identity(first) == identity(second)
    second.write_text("0.6")
    assert identity(first) != identity(second)
    assert identity(first) != identity(first, throws=401)


@pytest.mark.parametrize(
    "other",
    [Arm("old", "control"), Arm("fair", "control", setting="glued"), Arm("fair", "control", options={"bias": 0.1})],
    ids=["name", "setting", "options"],
)
def test_identity_differs_by_arm(coins, other):
    trial = load_trial("coins")()
    inputs = inputs_by_content(trial)
    assert run_identity("coins", trial, inputs, other, 0) != run_identity(
        "coins", trial, inputs, Arm("fair", "control"), 0
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose trial imports one module inside a function and leaves another alone."""
    root = tmp_path / "parts_of_it"
    root.mkdir()
    (root / "__init__.py").write_text("from parts_of_it.used import f\nfrom parts_of_it.alone import g\n")
    (root / "trial.py").write_text("def run():\n    from parts_of_it import f\n    return f()\n")
    (root / "used.py").write_text("from .deep import h\n\ndef f():\n    return h()\n")
    (root / "deep.py").write_text('"""About."""\n\ndef h():\n    return 1\n')
    (root / "alone.py").write_text("def g():\n    return 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_source_digest_follows_imports_inside_functions_and_through_the_package(package):
    before = source_digest("parts_of_it.trial:Trial")
    (package / "deep.py").write_text('"""About."""\n\ndef h():\n    return 3\n')
    assert source_digest("parts_of_it.trial:Trial") != before


def test_source_digest_ignores_docstrings_comments_and_modules_that_are_not_used(package):
    before = source_digest("parts_of_it.trial:Trial")
    (package / "deep.py").write_text('"""Something else."""\n\n# why\ndef h():\n    """Says more."""\n    return 1\n')
    (package / "alone.py").write_text("def g():\n    return 99\n")
    assert source_digest("parts_of_it.trial:Trial") == before
