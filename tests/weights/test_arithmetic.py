from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.weights.conftest import configure, exact, gpt2, llama, perturbed, rewrite, same_bits, save_family, tensors
from trialist.weights import apply_param_delta, delta_diagnostics


def test_every_tensor_is_the_sum_of_the_formula_rounded_once(family, tmp_path):
    apply_param_delta(family["new"], [(family["post"], family["base"], 0.7)], tmp_path / "out")
    new, post, base = (exact(family[name]) for name in ("new", "post", "base"))
    found = exact(tmp_path / "out")
    assert found.keys() == new.keys()
    for name, value in found.items():
        expected = new[name] + 0.7 * (post[name] - base[name])
        # float32 is rounded once in the difference and once in the sum
        bound = 2**-24 * (np.abs(post[name] - base[name]) + np.abs(expected)) * 1.01 + 1e-45
        assert (np.abs(value - expected) <= bound).all(), name
        assert (value != new[name]).mean() > 0.9, f"{name} did not change"


def test_alpha_zero_is_the_new_base_bit_for_bit(family, half_family, tmp_path):
    for number, members in enumerate((family, half_family)):
        out = tmp_path / str(number)
        apply_param_delta(members["new"], [(members["post"], members["base"], 0.0)], out)
        assert same_bits(tensors(out), tensors(members["new"]))


def test_the_same_base_gives_the_post_trained_model_exactly_in_float64_arithmetic(family, half_family, tmp_path):
    for number, members in enumerate((family, half_family)):
        out = tmp_path / str(number)
        apply_param_delta(members["base"], [(members["post"], members["base"], 1.0)], out, precision="float64")
        assert same_bits(tensors(out), tensors(members["post"]))


def test_in_float32_the_same_base_gives_post_up_to_half_an_ulp_of_the_difference(family, tmp_path):
    apply_param_delta(family["base"], [(family["post"], family["base"], 1.0)], tmp_path / "out")
    found, post, base = (exact(folder) for folder in (tmp_path / "out", family["post"], family["base"]))
    close = 0
    for name in found:
        difference = np.abs(post[name] - base[name]).astype(np.float32)
        error = np.abs(found[name] - post[name])
        assert (error <= 0.5 * np.spacing(difference) + 0.5 * np.spacing(np.abs(post[name]).astype(np.float32))).all()
        ratio = post[name] / np.where(base[name] == 0, 1, base[name])
        exactly = (ratio >= 0.5) & (ratio <= 2)
        assert (error[exactly] == 0).all()
        close += int(exactly.sum())
    assert close > 3000


def test_a_post_trained_model_that_is_its_base_leaves_the_new_base_as_it_is(half_family, tmp_path):
    apply_param_delta(half_family["new"], [(half_family["base"], half_family["base"], 1.0)], tmp_path / "out")
    assert same_bits(tensors(tmp_path / "out"), tensors(half_family["new"]))


def test_the_result_is_linear_in_alpha(family, tmp_path):
    found = {}
    for alpha in (-1.5, 0.25, 2.0):
        out = tmp_path / str(alpha)
        apply_param_delta(family["new"], [(family["post"], family["base"], alpha)], out, dtype="float64")
        found[alpha] = exact(out)
    new = exact(family["new"])
    for name in new:
        slopes = [(found[alpha][name] - new[name]) / alpha for alpha in found]
        np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-14)
        np.testing.assert_allclose(slopes[0], slopes[2], atol=1e-14)


def test_several_deltas_commute_and_equal_one_after_the_other(family, tmp_path):
    first, second = (family["post"], family["base"], 0.5), (family["other"], family["base"], -0.3)
    wide = {"dtype": "float64"}
    apply_param_delta(family["new"], [first, second], tmp_path / "both", **wide)
    apply_param_delta(family["new"], [second, first], tmp_path / "swapped", **wide)
    apply_param_delta(family["new"], [first], tmp_path / "one", **wide)
    apply_param_delta(str(tmp_path / "one"), [second], tmp_path / "two", **wide)
    both, swapped, two = (exact(tmp_path / name) for name in ("both", "swapped", "two"))
    new, base, post, other = (exact(family[name]) for name in ("new", "base", "post", "other"))
    for name in both:
        expected = new[name] + 0.5 * (post[name] - base[name]) - 0.3 * (other[name] - base[name])
        for found in (both, swapped, two):
            np.testing.assert_allclose(found[name], expected, atol=1e-15)


def test_a_linear_probe_answers_as_the_closed_form_says(tmp_path):
    """One matrix in a class that transformers does not have: outputs of a linear map add up."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 5, generator=generator)
    weights = {"base": base, "post": base + 0.01 * torch.randn(3, 5, generator=generator)}
    weights["new"] = base + 0.03 * torch.randn(3, 5, generator=generator)
    for name, weight in weights.items():
        (tmp_path / name).mkdir()
        save_file({"probe.weight": weight, "steps": torch.tensor([len(name)])}, tmp_path / name / "model.safetensors")
        configure(tmp_path / name, model_type="one-linear-layer")
    members = {name: str(tmp_path / name) for name in weights}
    report = apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], tmp_path / "out")
    x = torch.randn(7, 5, generator=generator)
    answers = {name: x @ weight.T for name, weight in weights.items()}
    found = tensors(tmp_path / "out")
    torch.testing.assert_close(x @ found["probe.weight"].T, answers["new"] + answers["post"] - answers["base"])
    assert found["steps"].tolist() == [3]  # whole numbers are the new base's
    assert "does not have the class" in report.notes[0]


@pytest.mark.parametrize("build", [lambda: llama(tie_word_embeddings=True), gpt2], ids=["llama, tied", "gpt2"])
def test_the_output_loads_in_transformers_with_the_logits_of_the_summed_weights(build, tmp_path):
    members = save_family(tmp_path, build)
    apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], tmp_path / "out")
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in members.items()}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    states = {name: dict(model.named_parameters()) for name, model in models.items()}
    with torch.no_grad():
        for name, parameter in models["new"].named_parameters():
            parameter += states["post"][name] - states["base"][name]
    ids = torch.randint(259, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, models["new"](ids).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == 12


def test_files_cut_otherwise_give_the_same_tensors(family, tmp_path):
    cut = save_family(tmp_path / "cut", lambda: llama(tie_word_embeddings=False), max_shard_size="9KB")
    assert len(list(Path(cut["new"]).glob("*.safetensors"))) > 3
    apply_param_delta(family["new"], [(family["post"], family["base"], 1.0)], tmp_path / "whole")
    apply_param_delta(cut["new"], [(family["post"], cut["base"], 1.0)], tmp_path / "pieces")
    assert same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "pieces"))
    index = json.loads((tmp_path / "pieces" / "model.safetensors.index.json").read_text())
    assert index == json.loads((Path(cut["new"]) / "model.safetensors.index.json").read_text()) | {
        "metadata": index["metadata"]
    }
    ids = torch.arange(6)[None]
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("whole", "pieces")]
    assert torch.equal(*loaded)


def test_the_size_of_stretches_changes_nothing(family, half_family, tmp_path, request):
    for number, members in enumerate((family, half_family)):
        deltas = [(members["post"], members["base"], 0.5), (members["other"], members["base"], 0.5)]
        whole = apply_param_delta(members["new"], deltas, tmp_path / f"whole{number}")
        request.getfixturevalue("small_blocks")
        pieces = apply_param_delta(members["new"], deltas, tmp_path / f"pieces{number}")
        assert same_bits(tensors(tmp_path / f"whole{number}"), tensors(tmp_path / f"pieces{number}"))
        assert whole.erased == pieces.erased
        for one, other in zip(whole.totals, pieces.totals):
            assert one.delta == pytest.approx(other.delta, rel=1e-5)


def test_a_tied_head_that_one_model_stores_twice_is_dropped(half_family, tmp_path):
    doubled = tmp_path / "doubled"
    model = AutoModelForCausalLM.from_pretrained(half_family["post"])
    model.save_pretrained(doubled)
    rewrite(doubled, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    deltas = [(half_family["post"], half_family["base"], 1.0)]
    apply_param_delta(half_family["new"], deltas, tmp_path / "plain")
    apply_param_delta(half_family["new"], [(str(doubled), half_family["base"], 1.0)], tmp_path / "out")
    assert same_bits(tensors(tmp_path / "plain"), tensors(tmp_path / "out"))
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    new = tmp_path / "new"
    AutoModelForCausalLM.from_pretrained(half_family["new"]).save_pretrained(new)
    rewrite(new, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    apply_param_delta(str(new), deltas, tmp_path / "from doubled")
    assert same_bits(tensors(tmp_path / "plain"), tensors(tmp_path / "from doubled"))
    rewrite(doubled, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight with different values"):
        apply_param_delta(half_family["new"], [(str(doubled), half_family["base"], 1.0)], tmp_path / "refused")


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_half_precision_sum_is_the_exact_sum_correctly_rounded(half_family, tmp_path, precision):
    apply_param_delta(
        half_family["new"], [(half_family["post"], half_family["base"], 1.0)], tmp_path / "out", precision=precision
    )
    new, post, base = (exact(half_family[name]) for name in ("new", "post", "base"))
    for name, found in tensors(tmp_path / "out").items():
        expected = torch.from_numpy(new[name] + (post[name] - base[name])).to(torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)


def probes(folder: Path, **values: list[float]) -> dict[str, str]:
    """Models of one bfloat16 tensor."""
    for name, value in values.items():
        (folder / name).mkdir(parents=True)
        save_file({"w": torch.tensor(value, dtype=torch.bfloat16)}, folder / name / "model.safetensors")
        configure(folder / name, model_type="probe")
    return {name: str(folder / name) for name in values}


def test_what_rounding_erases_is_counted_by_hand(tmp_path):
    # bfloat16 steps by 2^-7 between 1 and 2: 2^-9 is lost on 1.0, 2^-7 is not, 0 is no change; 2^-9 on 2^-4 is kept
    members = probes(tmp_path, new=[1.0, 1.0, 1.0, 2**-4], base=[0.0] * 4, post=[2**-9, 2**-7, 0.0, 2**-9])
    report = apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], tmp_path / "out", force=True)
    assert tensors(tmp_path / "out")["w"].tolist() == [1.0, 1 + 2**-7, 1.0, 2**-4 + 2**-9]
    assert (report.tensors[0].changed, report.tensors[0].erased) == (3, 1)
    assert report.erased == pytest.approx(1 / 3)


def test_stochastic_rounding_keeps_small_deltas_on_average_and_picks_neighbours_only(tmp_path):
    members = probes(tmp_path, new=[1.0] * 4000 + [-1.0] * 4000, base=[0.0] * 8000, post=[2**-9] * 8000)
    deltas = [(members["post"], members["base"], 1.0)]
    apply_param_delta(members["new"], deltas, tmp_path / "out", rounding="stochastic", seed=3)
    found = tensors(tmp_path / "out")["w"].double()
    assert set(found[:4000].tolist()) == {1.0, 1 + 2**-7}
    assert set(found[4000:].tolist()) == {-1.0, -1 + 2**-8}
    spread = 2**-7 * math.sqrt(0.25 * 0.75 / 4000)
    assert float(found[:4000].mean()) == pytest.approx(1 + 2**-9, abs=4 * spread)
    assert float(found[4000:].mean()) == pytest.approx(-1 + 2**-9, abs=4 * spread)
    apply_param_delta(members["new"], deltas, tmp_path / "again", rounding="stochastic", seed=3)
    assert same_bits(tensors(tmp_path / "out"), tensors(tmp_path / "again"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_takes_a_neighbour_of_the_exact_sum_whatever_the_stretches(
    family, tmp_path, dtype, request
):
    deltas = [(family["post"], family["base"], 1.0)]
    chosen = {"dtype": dtype, "rounding": "stochastic", "exclude": ["*norm*"]}
    apply_param_delta(family["new"], deltas, tmp_path / "whole", **chosen)
    apply_param_delta(family["new"], deltas, tmp_path / "other", seed=1, **chosen)
    request.getfixturevalue("small_blocks")
    apply_param_delta(family["new"], deltas, tmp_path / "pieces", **chosen)
    assert same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "pieces"))
    assert not same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "other"))
    kind = getattr(torch, dtype)
    sums = tensors(family["new"])
    post, base = tensors(family["post"]), tensors(family["base"])
    for name, found in tensors(tmp_path / "whole").items():
        wanted = sums[name] if "norm" in name else sums[name] + (post[name] - base[name])
        below, above = (
            torch.nextafter(wanted.to(kind), torch.tensor(end, dtype=kind)).float() for end in (-torch.inf, torch.inf)
        )
        assert found.dtype == kind
        assert bool(((found.float() > below) | (wanted.to(kind).float() > wanted)).all()), name
        assert bool(((found.float() < above) | (wanted.to(kind).float() < wanted)).all()), name
        assert bool(((found.float() >= below) & (found.float() <= above)).all()), name


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 1.0])
def test_what_rounding_erases_does_not_depend_on_how_it_is_rounded(family, tmp_path, alpha):
    deltas = [(family["post"], family["base"], alpha)]
    found = {
        rounding: apply_param_delta(family["new"], deltas, tmp_path / rounding, dtype="bfloat16", rounding=rounding)
        for rounding in ("nearest", "stochastic")
    }
    assert found["nearest"].erased == found["stochastic"].erased
    assert found["nearest"].erased == 1 if alpha == 1e-9 else found["nearest"].erased < 1
    assert "rounding to nearest would erase" in found["stochastic"].summary()


def test_the_dtype_of_the_output_is_that_of_the_new_base_or_the_chosen_one(family, half_family, tmp_path):
    mixed = [(half_family["post"], half_family["base"], 1.0)]
    tied = save_family(tmp_path / "tied", lambda: llama(tie_word_embeddings=True))
    apply_param_delta(tied["new"], mixed, tmp_path / "auto")
    assert {tensor.dtype for tensor in tensors(tmp_path / "auto").values()} == {torch.float32}
    apply_param_delta(family["new"], [(family["post"], family["base"], 1.0)], tmp_path / "half", dtype="float16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "half").values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


def test_only_named_tensors_get_the_delta(family, tmp_path):
    apply_param_delta(
        family["new"],
        [(family["post"], family["base"], 1.0)],
        tmp_path / "out",
        include=["*.layers.1.*"],
        exclude=["*norm*"],
    )
    found, new = tensors(tmp_path / "out"), tensors(family["new"])
    changed = {name for name in new if not torch.equal(found[name], new[name])}
    assert changed == {name for name in new if ".layers.1." in name and "norm" not in name}
    with pytest.raises(ValueError, match=r"--exclude '\*attention' matches no tensor"):
        apply_param_delta(
            family["new"], [(family["post"], family["base"], 1.0)], tmp_path / "none", exclude=["*attention"]
        )


def test_the_report_has_the_norms_and_angles_of_each_tensor(family, tmp_path):
    report = delta_diagnostics(family["new"], family["post"], family["base"])
    new, post, base = (exact(family[name]) for name in ("new", "post", "base"))
    for line in report.tensors:
        delta, shift = post[line.name] - base[line.name], new[line.name] - base[line.name]
        shown = line.deltas[0].shown()
        norms = np.linalg.norm(delta), np.linalg.norm(shift)
        assert shown["delta_norm"] == pytest.approx(norms[0], rel=1e-5)
        assert shown["shift_norm"] == pytest.approx(norms[1], rel=1e-5)
        assert shown["delta_shift_cosine"] == pytest.approx((delta * shift).sum() / norms[0] / norms[1], abs=1e-5)
        cosine = (
            (base[line.name] * new[line.name]).sum() / np.linalg.norm(base[line.name]) / np.linalg.norm(new[line.name])
        )
        assert shown["base_cosine"] == pytest.approx(cosine, abs=1e-5)
    total = math.sqrt(sum(((post[name] - base[name]) ** 2).sum() for name in post))
    assert math.sqrt(report.totals[0].delta) == pytest.approx(total, rel=1e-5)


def test_values_beyond_the_output_dtype_and_values_that_are_no_numbers_are_named(own, tmp_path):
    rewrite(own["new"], lambda t: t | {"model.norm.weight": torch.full((12,), 1e6)})
    deltas = [(own["post"], own["base"], 1.0)]
    with pytest.raises(ValueError, match=r"model.norm.weight has values beyond the range of float16, up to 1e\+06"):
        apply_param_delta(own["new"], deltas, tmp_path / "out", dtype="float16")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(own["post"], lambda t: t | {name: t[name].where(t[name] < t[name].max(), torch.nan)})
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj.weight of .*post holds values that are not finite"
    ):
        apply_param_delta(own["new"], deltas, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float64"])
def test_sums_beyond_the_range_they_are_computed_in_are_refused(tmp_path, dtype):
    for name, value in (("new", 1.0), ("base", 0.0), ("post", 1e10)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((5,), value)}, tmp_path / name / "model.safetensors")
        configure(tmp_path / name, model_type="probe")
    new, post, base = (str(tmp_path / name) for name in ("new", "post", "base"))
    out = tmp_path / "out"
    if dtype == "float64":
        apply_param_delta(new, [(post, base, 1e39)], out, dtype=dtype)
        assert tensors(out)["w"].tolist() == pytest.approx([1e49] * 5)
        return
    with pytest.raises(ValueError, match="w has values beyond the range of float32, up to inf; choose a smaller alpha"):
        apply_param_delta(new, [(post, base, 1e30)], out, dtype=dtype)
    with pytest.raises(ValueError, match=r"alpha of .*post' is 1e\+39, beyond the range of float32"):
        apply_param_delta(new, [(post, base, 1e39)], out, dtype=dtype)
    assert not out.exists()


def test_squares_beyond_float32_are_no_reason_to_refuse(tmp_path):
    for name, value in (("new", 3e25), ("base", 3e25), ("post", 3.2e25)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((5,), value)}, tmp_path / name / "model.safetensors")
        configure(tmp_path / name, model_type="probe")
    members = {name: str(tmp_path / name) for name in ("new", "base", "post")}
    report = apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], tmp_path / "out")
    assert math.sqrt(report.totals[0].delta) == pytest.approx(0.2e25 * math.sqrt(5), rel=1e-5)


def test_a_perturbed_copy_differs(family):
    """The other tests would pass on equal models; this one fails then."""
    base, post = tensors(family["base"]), tensors(family["post"])
    assert not any(torch.equal(base[name], post[name]) for name in base)
    assert perturbed(llama(), 1.0, 0).lm_head.weight.std() > 0.9
