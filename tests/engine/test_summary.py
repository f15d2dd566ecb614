from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.engine import synthetic_trials as made
from trialist.engine.contract import Arm, Endpoint
from trialist.engine.plain import clean, dump_json
from trialist.engine.summary import (
    CURVE_POINTS,
    EVIDENCE_KEYS,
    KEPT_CURVES,
    KEPT_REMARKS,
    evidence_document,
    write_evidence,
)

SCHEMA_KEYS = [
    "schema",
    "trial",
    "preset",
    "claim",
    "source",
    "reported",
    "verdict",
    "reason",
    "endpoint",
    "unit",
    "better",
    "margin",
    "replicate",
    "interval_method",
    "treatment",
    "effects",
    "guards",
    "null_effects",
    "settings",
    "arms",
    "cost_ratio",
    "tuning",
    "inputs",
    "versions",
    "hardware",
    "command",
    "date",
]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    return {
        "supported": made.document(),
        "contradicted": made.contradicted(),
        "inconclusive": made.inconclusive(),
        "void": made.void(),
        "non-inferior": made.non_inferior(),
    }


def test_the_evidence_file_has_every_key_of_the_schema_and_effects_have_theirs(documents: dict[str, dict]) -> None:
    for document in documents.values():
        evidence = evidence_document(document)
        assert list(evidence)[: len(SCHEMA_KEYS)] == SCHEMA_KEYS == list(EVIDENCE_KEYS)
        assert evidence["schema"] == 1
        for effect in evidence["effects"]:
            assert next(iter(effect)) == "control"
            assert {"control", "effect", "low", "high", "n"} <= set(effect)


def test_every_document_round_trips_through_strict_json(documents: dict[str, dict]) -> None:
    for document in documents.values():
        assert json.loads(dump_json(document)) == document
        assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_values_of_every_seed_stand_in_the_order_of_the_seeds() -> None:
    records = [made.run("standard attention", seed, 3.0 + seed / 10) for seed in (2, 0, 1)]
    document = made.document(records=records)
    arm = next(entry for entry in document["arms"] if entry["arm"] == "standard attention" and not entry["null"])
    assert arm["seeds"] == [0, 1, 2]
    assert arm["endpoints"]["bits_per_byte"] == pytest.approx([3.0, 3.1, 3.2])
    assert arm["runs"] == [f"standard_attention-main-{seed}" for seed in (0, 1, 2)]
    assert arm["cost"]["wall_seconds"] == 60.0


def test_a_number_that_is_not_finite_becomes_null_with_its_reason(documents: dict[str, dict]) -> None:
    arm = next(
        entry for entry in documents["void"]["arms"] if entry["arm"] == "selective attention" and not entry["null"]
    )
    values = dict(zip(arm["seeds"], arm["endpoints"]["bits_per_byte"]))
    reasons = {entry["seed"]: entry["reason"] for entry in arm["undefined"]}
    assert values[1] is None
    assert "nan" in reasons[1]
    assert values[5] is None
    assert reasons[5] == "no test bytes"
    assert arm["divergences"] == 2


def test_an_effect_that_is_not_finite_becomes_null_with_its_reason() -> None:
    broken = dataclasses.replace(made.SUPPORTED.effects[0], low=-math.inf, reason=None)
    document = made.document(dataclasses.replace(made.SUPPORTED, effects=(broken,)))
    assert document["effects"][0]["low"] is None
    assert "low" in document["effects"][0]["reason"]


def test_a_failed_run_is_kept_with_its_error_and_not_counted_as_measured(documents: dict[str, dict]) -> None:
    failure = documents["void"]["failures"][0]
    assert failure["error"].startswith("MemoryError")
    assert "Traceback" in failure["traceback"]
    arm = documents["void"]["arms"][0]
    assert 4 not in arm["seeds"]
    assert arm["failed"] == [4]
    assert "traceback" not in evidence_document(documents["void"])["failures"][0]


def test_runs_of_tuning_and_stale_runs_do_not_count() -> None:
    records = made.runs(3)
    extra = (
        dataclasses.replace(records[0], seed=7, purpose="tuning"),
        dataclasses.replace(records[0], seed=8, status="stale"),
    )
    assert made.document(records=[*records, *extra])["arms"] == made.document(records=records)["arms"]


def test_the_mean_curve_is_the_mean_over_all_seeds_also_where_only_some_are_kept() -> None:
    arms = (Arm("a", "control"), Arm("b", "treatment"))
    seeds = KEPT_CURVES + 7
    records = [
        dataclasses.replace(
            made.run("a", seed, 1.0), outcome=made.Outcome({}, {}, {"loss": ((10.0, seed), (20.0, seed * 3.0))})
        )
        for seed in range(seeds)
    ]
    document = made.document(records=records, arms=arms)
    mean = (seeds - 1) / 2
    assert document["curve_means"][0]["points"] == [[10.0, mean], [20.0, mean * 3]]
    assert len(document["curves"]) == KEPT_CURVES


def test_curves_with_other_budgets_are_averaged_only_where_all_have_values() -> None:
    arms = (Arm("a", "control"), Arm("b", "treatment"))
    lines = ((0.0, 0.0), (4.0, 4.0)), ((2.0, 4.0), (3.0, 6.0), (8.0, 16.0))  # y = x and y = 2x
    records = [
        dataclasses.replace(made.run("a", seed, 1.0), outcome=made.Outcome({}, {}, {"loss": points}))
        for seed, points in enumerate(lines)
    ]
    points = made.document(records=records, arms=arms)["curve_means"][0]["points"]
    assert points[0] == pytest.approx([2.0, 3.0])
    assert points[-1] == pytest.approx([4.0, 6.0])


def test_readings_over_a_range_are_averaged_point_by_point() -> None:
    arms = (Arm("a", "control"), Arm("b", "treatment"))
    lines = ((0.1, 4.0), (0.5, 2.0)), ((0.2, 6.0), (0.5, 3.0))  # sizes are met only nearly
    records = [
        dataclasses.replace(made.run("a", seed, 1.0), outcome=made.Outcome({}, {}, {"loss_by_size": points}))
        for seed, points in enumerate(lines)
    ]
    points = made.document(records=records, arms=arms)["curve_means"][0]["points"]
    assert points == [pytest.approx([0.15, 5.0]), pytest.approx([0.5, 2.5])]


def test_of_many_remarks_of_runs_the_first_are_told_and_the_others_counted() -> None:
    arms = (Arm("a", "control"), Arm("b", "treatment"))
    notes = [("the same in every run", *(f"seed {seed}, point {point}" for point in range(9))) for seed in range(6)]
    records = [
        dataclasses.replace(made.run("a", seed, 1.0), outcome=made.Outcome(notes=said))
        for seed, said in enumerate(notes)
    ]
    threats = made.document(records=records, arms=arms)["threats"]
    first = threats.index("the same in every run")
    told = threats[first:]
    assert len(told) == KEPT_REMARKS + 1
    assert told[-1] == "15 further remarks of single runs stand in the ledger"


def test_long_curves_keep_their_ends() -> None:
    arms = (Arm("a", "control"), Arm("b", "treatment"))
    points = tuple((float(i), 1.0 / (i + 1)) for i in range(5_003))
    run = dataclasses.replace(made.run("a", 0, 1.0), outcome=made.Outcome({}, {}, {"loss": points}))
    kept = made.document(records=[run], arms=arms)["curves"][0]["points"]
    assert len(kept) == CURVE_POINTS
    assert kept[0][0] == 0.0
    assert kept[-1][0] == 5_002.0


def test_items_are_counted_as_won_lost_and_tied_in_the_direction_of_the_endpoint() -> None:
    arms = (Arm("full", "control"), Arm("half", "treatment"))
    scores = {"full": (1.0, 0.0, 1.0, 0.0), "half": (1.0, 1.0, 0.0, 0.0)}
    ids = ("p", "q", "r", "s")
    records = [
        dataclasses.replace(
            made.run(arm, 0, 1.0), outcome=made.Outcome({"accuracy": 50.0}, {"accuracy": made.Items(ids, values)})
        )
        for arm, values in scores.items()
    ]
    verdict = dataclasses.replace(made.SUPPORTED, treatment="half", effects=())
    items = made.document(verdict, records, arms, made.CacheTrial())["items"][0]
    assert (items["won"], items["lost"], items["tied"]) == (1, 1, 2)
    assert items["most_won"] == [{"id": "q", "gain": 1.0, "control": 0.0, "treatment": 1.0}]
    assert items["most_lost"][0]["id"] == "r"


def test_an_endpoint_and_margin_of_the_user_replace_those_of_the_claim() -> None:
    document = made.document(endpoint=Endpoint("loss", unit="nats", better="higher", margin=0.3), margin=0.1)
    assert (document["endpoint"], document["unit"], document["better"], document["margin"]) == (
        "loss",
        "nats",
        "higher",
        0.1,
    )
    assert made.document()["margin"] == 0.02


def test_evidence_is_written_whole_and_named_by_its_file(tmp_path: Path, documents: dict[str, dict]) -> None:
    path = write_evidence(documents["supported"], tmp_path / "selective-attention", "tiny")
    assert path == tmp_path / "selective-attention" / "tiny.json"
    assert json.loads(path.read_text()) == evidence_document(documents["supported"])
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.json"]
    with pytest.raises(ValueError, match=r"a/b.*without slashes"):
        write_evidence(documents["supported"], tmp_path, "a/b")


def test_clean_turns_tuples_dataclasses_and_keys_into_plain_json() -> None:
    value = {1: (2, float("inf")), "s": {"b", "a"}, "d": made.BPB, "p": Path("x")}
    assert clean(value) == {
        "1": [2, None],
        "s": ["a", "b"],
        "d": clean(dataclasses.asdict(made.BPB)),
        "p": "x",
    }
