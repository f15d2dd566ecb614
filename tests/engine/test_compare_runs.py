from __future__ import annotations

import pytest
from scipy import stats

from trialist.engine.compare_runs import compare_runs
from trialist.engine.contract import Items, Outcome
from trialist.engine.ledger import Ledger
from trialist.engine.records import Configuration, PlannedRun

BEFORE, AFTER = (0.1, 0.5, 0.3, 0.9, 0.2), (0.4, 0.45, 0.7, 0.95, 0.6)
IDS = tuple("abcde")


@pytest.fixture
def store(coins, tmp_path):
    """Stores a run of the trial `coins` with the items given and returns the ledger's path."""
    path = tmp_path / "ledger.db"

    def store(name: str, outcome: Outcome | None, throws: int = 3):
        ledger = Ledger(path)
        key = f"key-{throws}"
        ledger.register(Configuration(key, "coins", "trialist_coins:CoinsTrial", "", {"throws": throws}, "command"))
        ledger.enqueue([PlannedRun(name, name, "s", key, "coins", "table", f"arm {name}", 0, {})])
        assert ledger.claim(name)
        if outcome is not None:
            ledger.finish(name, outcome, {})
        ledger.close()
        return path

    return store


def heads(scores: tuple[float, ...], ids: tuple[str, ...] = IDS, clusters=None, **more: Items) -> Outcome:
    return Outcome(items={"heads": Items(ids, scores, clusters), **more})


def test_two_runs_are_paired_by_item_whatever_their_order(store):
    store("aa1", heads(BEFORE))
    path = store("bb2", heads(AFTER[::-1], IDS[::-1]))
    result = compare_runs(path, "aa1", "bb2", margin=0.1)
    expected = stats.ttest_rel(AFTER, BEFORE).confidence_interval(0.95)
    assert result["effect"] == pytest.approx(sum(y - x for x, y in zip(BEFORE, AFTER)) / 5)
    assert (result["low"], result["high"]) == pytest.approx((expected.low, expected.high))
    assert (result["won"], result["lost"]) == (4, 1)
    assert result["flips"]["lost"] == [{"id": "b", "a": 0.5, "b": 0.45}]
    assert result["metric"] == "heads"
    assert result["verdict"] == "inconclusive"
    assert compare_runs(path, "aa1", "bb2", better="lower")["effect"] == pytest.approx(-result["effect"])


def test_the_clusters_of_the_items_are_kept(store):
    store("aa1", heads(BEFORE, clusters=("x", "x", "y", "y", "z")))
    path = store("bb2", heads(AFTER, clusters=("x", "x", "y", "y", "z")))
    result = compare_runs(path, "aa1", "bb2")
    assert (result["clusters"], result["n"]) == (3, 3)


def test_other_inputs_are_said(store):
    store("aa1", heads(BEFORE))
    path = store("bb2", heads(AFTER), throws=4)
    assert "throws (3 and 4)" in compare_runs(path, "aa1", "bb2")["remarks"][0]


def test_what_cannot_be_compared_is_refused_in_words(store):
    streak = Items(IDS, BEFORE)
    store("aa1", heads(BEFORE, own=streak))
    store("bb2", heads(AFTER, tuple("abcdf"), own=Items(tuple("abcdf"), AFTER)))
    store("cc3", Outcome(metrics={"heads": 0.5}))
    store("dd4", Outcome(items={"tails": streak}))
    store("ff6", heads(AFTER, own=streak))
    path = store("ee5", None)
    with pytest.raises(ValueError, match=r"aa1 and bb2 were not scored on the same items: 1 items only in the control"):
        compare_runs(path, "aa1", "bb2")
    with pytest.raises(ValueError, match=r"cc3 .* stores no score per item"):
        compare_runs(path, "aa1", "cc3")
    with pytest.raises(ValueError, match=r"no metric in common: aa1 has heads, own; dd4 has tails"):
        compare_runs(path, "aa1", "dd4")
    with pytest.raises(ValueError, match=r"ee5 is running"):
        compare_runs(path, "aa1", "ee5")
    with pytest.raises(ValueError, match=r"no run 'zz'"):
        compare_runs(path, "aa1", "zz")
    with pytest.raises(ValueError, match=r"run 'd': give at least 4 characters of the id"):
        compare_runs(path, "aa1", "d")
    with pytest.raises(ValueError, match=r"no metric 'acc' per item in both runs"):
        compare_runs(path, "aa1", "ff6", metric="acc")
    with pytest.raises(ValueError, match=r"which direction of 'own' is better"):
        compare_runs(path, "aa1", "ff6", metric="own")
