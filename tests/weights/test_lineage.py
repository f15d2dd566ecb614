from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from tests.weights.conftest import configure, exact, gpt2, llama, rewrite, save_family, tensors
from trialist.data.tokenizers import byte_tokenizer
from trialist.weights import apply_param_delta, delta_diagnostics
from trialist.weights.checkpoint import open_checkpoint
from trialist.weights.lineage import PIECE, PIECES, likeness, stretches


def apply(members, out, **options):
    return apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], out, **options)


@pytest.fixture
def foreign(tmp_path) -> str:
    """The same architecture from another seed."""
    folder = tmp_path / "foreign"
    llama(7, tie_word_embeddings=False).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_likeness_is_the_mean_cosine_over_matrices(family, foreign):
    for second in (family["new"], foreign):
        with open_checkpoint(family["base"]) as one, open_checkpoint(second) as other:
            found = likeness(one, other)
        base, new = exact(family["base"]), exact(second)
        cosines = {
            name: float((base[name] * new[name]).sum() / np.linalg.norm(base[name]) / np.linalg.norm(new[name]))
            for name in base
            if base[name].ndim == 2
        }
        assert found.matrices == len(cosines) == 16
        assert found.cosine == pytest.approx(np.mean(list(cosines.values())), abs=1e-9)
        assert found.lowest_name == min(cosines, key=cosines.__getitem__)
        assert found.lowest == pytest.approx(cosines[found.lowest_name], abs=1e-9)


def test_large_matrices_are_judged_by_stretches_that_reach_from_end_to_end():
    size = PIECES * PIECE
    assert stretches(size) == [(0, size)]
    for elements in (size + 1, 10 * size + 7):
        found = stretches(elements)
        assert len(found) == PIECES
        assert all(stop - start == PIECE for start, stop in found)
        assert (found[0][0], found[-1][1]) == (0, elements)
        assert all(after[0] >= before[1] for before, after in itertools.pairwise(found))


def test_a_foreign_base_is_refused_and_force_records_that_it_was(family, foreign, tmp_path):
    members = {**family, "new": foreign}
    with pytest.raises(
        ValueError, match=r"not of one lineage: the mean cosine between their 16 matrices is -?0\.0"
    ) as error:
        apply(members, tmp_path / "out")
    assert "at least 0.5 is wanted" in str(error.value)
    assert "--force goes on, and the record says so" in str(error.value)
    assert not (tmp_path / "out").exists()
    report = apply(members, tmp_path / "out", force=True)
    record = json.loads((tmp_path / "out" / "param_delta.json").read_text())
    assert record["forced"] is True
    assert record["overridden"] == report.overridden
    assert "not of one lineage" in report.overridden[0]
    base, post, new = (tensors(members[name])["model.norm.weight"] for name in ("base", "post", "new"))
    assert torch.equal(tensors(tmp_path / "out")["model.norm.weight"], new + (post - base))


def test_a_post_trained_model_of_another_base_is_refused_too(family, foreign, tmp_path):
    with pytest.raises(ValueError, match=r"foreign and .*base are not of one lineage"):
        apply_param_delta(family["new"], [(foreign, family["base"], 1.0)], tmp_path / "out")


def test_diagnostics_say_what_would_be_refused(family, foreign):
    assert delta_diagnostics(family["new"], family["post"], family["base"]).overridden == []
    report = delta_diagnostics(foreign, family["post"], family["base"])
    assert len(report.overridden) == 1
    assert "not of one lineage" in report.overridden[0]


def test_another_meaning_of_matrices_of_equal_shape_is_refused(own, tmp_path):
    configure(own["new"], num_attention_heads=6, head_dim=2, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"num_attention_heads is 3 in .*base and 6 in .*new"):
        apply(own, tmp_path / "out")
    report = apply(own, tmp_path / "out", force=True)
    assert any("num_key_value_heads is 1" in words for words in report.overridden)


def test_rotary_settings_that_differ_are_told_and_taken_from_the_new_base(own, tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    configure(own["new"], rope_parameters=scaling, max_position_embeddings=64)
    report = apply(own, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == scaling
    assert config["max_position_embeddings"] == 64
    said = " ".join(report.notes)
    assert "settings are the new base's: max_position_embeddings is 32" in said
    assert "rope_parameters.rope_theta is 10000.0" in said


def test_a_model_of_vectors_alone_has_nothing_to_tell_its_lineage_by(own, tmp_path):
    rewrite(own["new"], lambda t: {"w": t["model.norm.weight"]})
    rewrite(own["base"], lambda t: {"w": -t["model.norm.weight"]})
    with open_checkpoint(own["base"]) as one, open_checkpoint(own["new"]) as other:
        found = likeness(one, other)
    assert (found.cosine, found.matrices) == (None, 0)


def test_what_is_no_weight_and_what_gets_no_delta_says_nothing_about_lineage(tmp_path):
    """GPT-2's stored masks are equal in all models."""
    members = save_family(tmp_path, gpt2)
    gpt2(9).save_pretrained(tmp_path / "foreign")
    byte_tokenizer().save_pretrained(tmp_path / "foreign")
    foreign = str(tmp_path / "foreign")
    plain = delta_diagnostics(foreign, members["post"], members["base"]).likeness[0]
    masks = {f"transformer.h.{layer}.attn.bias": torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32) for layer in (0, 1)}
    for folder in (foreign, members["post"], members["base"], members["new"]):
        rewrite(folder, lambda t: t | masks)
    assert delta_diagnostics(foreign, members["post"], members["base"]).likeness[0] == plain
    report = apply(members, tmp_path / "out", exclude=["*wte*", "*wpe*"])
    assert report.likeness[0].matrices == plain.matrices - 2


def test_relatives_far_apart_go_through_with_a_note(own, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rewrite(
        own["new"],
        lambda t: {name: v + 0.8 * v.std() * torch.randn(v.shape, generator=generator) for name, v in t.items()},
    )
    report = apply(own, tmp_path / "out")
    assert 0.5 < report.likeness[0].cosine < 0.9
    assert report.overridden == []
    assert any("are related, but far apart" in note and "expect less to carry over" in note for note in report.notes)


def test_a_delta_that_does_not_count_is_not_judged(family, foreign, tmp_path):
    deltas = [(family["post"], family["base"], 1.0), (foreign, family["base"], 0.0)]
    report = apply_param_delta(family["new"], deltas, tmp_path / "out")
    assert [entry.second for entry in report.likeness] == [family["new"], family["base"]]
    assert report.totals[1] is None
    assert report.summary()["delta 2"] == "not read, its alpha is 0"
    assert json.loads((tmp_path / "out" / "param_delta.json").read_text())["totals"][1] is None
