"""The transforms as a user calls them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.weights.conftest import exact, tensors
from trialist.cli.apply import main
from trialist.weights.param_delta import ParamDelta

LOOKING_AROUND = """
import sys
from trialist.cli.apply import main
for arguments in ([], ["param-delta", "--help"], ["extract-delta", "--help"]):
    try: main(arguments)
    except SystemExit: pass
print("loaded", *({"torch", "transformers", "safetensors", "numpy"} & set(sys.modules)))
"""


def test_listing_and_help_load_no_heavy_library():
    done = subprocess.run([sys.executable, "-c", LOOKING_AROUND], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_the_command_writes_a_model_and_says_how_it_went(family, tmp_path, capsys):
    command = ["param-delta", "--base-new", family["new"], "--post", family["post"], "--base", family["base"]]
    assert main([*command, "--alpha", "0.5", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for words in ("likeness of ", "over 16 matrices", "delta", "norm ", "seconds"):
        assert words in said
    new, post, base, found = (
        tensors(folder)["lm_head.weight"]
        for folder in (family["new"], family["post"], family["base"], tmp_path / "out")
    )
    torch.testing.assert_close(found, new + 0.5 * (post - base))


def test_several_deltas_share_a_base_or_have_one_each(family, tmp_path):
    shared = ParamDelta(
        family["new"], (family["post"], family["other"]), (family["base"],), str(tmp_path / "shared"), alpha=(0.5, 0.25)
    )
    shared(say=lambda text: None)
    apart = ParamDelta(
        family["new"],
        (family["post"], family["other"]),
        (family["base"],) * 2,
        str(tmp_path / "apart"),
        alpha=(0.5, 0.25),
    )
    apart(say=lambda text: None)
    name = "model.layers.0.mlp.up_proj.weight"
    found = [tensors(tmp_path / folder)[name] for folder in ("shared", "apart")]
    assert torch.equal(*found)
    new, post, base, other = (tensors(family[key])[name] for key in ("new", "post", "base", "other"))
    torch.testing.assert_close(found[0], new + 0.5 * (post - base) + 0.25 * (other - base))
    with pytest.raises(ValueError, match=r"--alpha takes one value .* 2 --post, 3 --alpha"):
        ParamDelta(family["new"], (family["post"],) * 2, (family["base"],), "x", alpha=(1.0, 2.0, 3.0))(print)


def test_the_adapter_command_writes_what_peft_loads(family, tmp_path, capsys):
    from peft import PeftModel

    command = [
        "extract-delta",
        "--post",
        family["post"],
        "--base",
        family["base"],
        "--output",
        str(tmp_path / "adapter"),
    ]
    assert main([*command, "--rank", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "layers                 14, ranks 2 to 2" in said.out
    assert "tensors are left out" in said.err
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family["base"]), tmp_path / "adapter")
    assert model.generate(torch.arange(5)[None], max_new_tokens=2, do_sample=False).shape == (1, 7)


def test_alpha_that_is_no_number_and_unknown_choices_are_refused(family):
    from trialist.weights import apply_param_delta

    with pytest.raises(ValueError, match=r"alpha of .*post' is nan"):
        apply_param_delta(family["new"], [(family["post"], family["base"], float("nan"))], "x")
    with pytest.raises(ValueError, match="at least one delta"):
        apply_param_delta(family["new"], [], "x")
    with pytest.raises(ValueError, match=r"--dtype is 'int8'; choose one of auto, float32"):
        apply_param_delta(family["new"], [(family["post"], family["base"], 1.0)], "x", dtype="int8")


def test_seeds_out_of_range_and_an_empty_output_are_named(family, tmp_path):
    from trialist.weights import apply_param_delta, extract_delta

    deltas = [(family["post"], family["base"], 1.0)]
    for seed in (-1, 10**40):
        with pytest.raises(ValueError, match=rf"--seed is a whole number from 0 to 2\^63 - 1, not {seed}"):
            apply_param_delta(family["new"], deltas, tmp_path / "out", rounding="stochastic", seed=seed)
        with pytest.raises(ValueError, match="--seed is a whole number"):
            extract_delta(family["post"], family["base"], tmp_path / "out", seed=seed)
    with pytest.raises(ValueError, match="--output is empty"):
        apply_param_delta(family["new"], deltas, "")
    with pytest.raises(ValueError, match="--output is empty"):
        extract_delta(family["post"], family["base"], "")


PEER = os.environ.get("MERGEKIT_PYTHON")


@pytest.mark.skipif(
    PEER is None, reason="MERGEKIT_PYTHON names no interpreter that has mergekit, which wants older packages"
)
@pytest.mark.parametrize("theirs", ["float32", "float64"])
def test_the_sum_is_mergekit_s_up_to_the_rounding_of_both(family, tmp_path, theirs):
    """mergekit takes each difference from the new base: float32 rounds both of them, and the sum twice."""
    (tmp_path / "config.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {family['new']}\nmodels:\n"
        f"  - model: {family['post']}\n    parameters: {{weight: 1.0}}\n"
        f"  - model: {family['base']}\n    parameters: {{weight: -1.0}}\n"
        f"parameters: {{normalize: false}}\ndtype: {theirs}\nout_dtype: float32\n"
    )
    command = [str(PEER), "-m", "mergekit.scripts.run_yaml", tmp_path / "config.yaml", tmp_path / "theirs"]
    subprocess.run(command, check=True, capture_output=True)
    for precision in ("float32", "float64"):
        ours = ParamDelta(
            family["new"], (family["post"],), (family["base"],), str(tmp_path / precision), precision=precision
        )
        ours(say=lambda text: None)
    peer = tensors(tmp_path / "theirs")
    new, post, base = (exact(family[name]) for name in ("new", "post", "base"))
    for name, wide in tensors(tmp_path / "float64").items():
        found, expected = tensors(tmp_path / "float32")[name], new[name] + (post[name] - base[name])
        if theirs == "float64":
            assert torch.equal(wide, peer[name])
        half = 2.0**-24 * 1.001  # of a number, what rounding to float32 takes or adds at most
        once = half * (np.abs(post[name] - base[name]) + np.abs(expected))
        assert (np.abs(found.double().numpy() - expected) <= once).all()
        apart = np.abs(post[name] - new[name]) + np.abs(base[name] - new[name])
        assert (np.abs(peer[name].double().numpy() - expected) <= half * (2 * apart + 2 * np.abs(expected))).all()
