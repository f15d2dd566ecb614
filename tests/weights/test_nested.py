"""Nested clusters of rows against every way to cut them, and models made of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from trialist.kernels.nested import unpack_codes
from trialist.models import NestedQuantConfig, available_bits, get_precision, nested_bytes, precision
from trialist.models.nested.precision import nested_layers
from trialist.weights.nested import cluster_rows, quantize_nested, sensitivities
from trialist.weights.nested.partition import coarser, gains, move_together, split
from trialist.weights.nested.seeds import drawn_seeds
from trialist.weights.nested.sums import sort_rows
from trialist.weights.round_to_nearest import round_to_nearest

from .conftest import gpt2, llama


def heavy(R=4, K=60, seed=0):
    """Rows with long tails, and sensitivities over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(R, K, generator=generator) ** 3
    return weight, torch.rand(R, K, generator=generator) ** 6 + 1e-6


def cost(weight, sensitivity, clusters, b, P):
    """(R,) weighted squares of what is lost."""
    near = clusters.tables[b].gather(1, (clusters.codes >> (P - b)).long())
    return (sensitivity.double() * (weight.double() - near) ** 2).sum(1)


def least(values, counts):
    """Cost of one cluster of numbers."""
    if not values:
        return 0.0
    mean = sum(c * v for c, v in zip(counts, values, strict=True)) / sum(counts)
    return sum(c * (v - mean) ** 2 for c, v in zip(counts, values, strict=True))


@pytest.mark.parametrize("K", [1, 2, 7, 12])
def test_a_split_is_the_best_of_all_ways_to_part_the_numbers_in_two(K):
    weight, sensitivity = heavy(3, K)
    rows = sort_rows(weight, sensitivity)
    clusters = cluster_rows(weight, sensitivity, seed_bits=1, parent_bits=1)
    found = cost(weight, sensitivity, clusters, 1, 1)
    assert split(rows, torch.tensor([[0, K]] * 3)).shape == (3, 3)
    for r in range(3):
        values, counts = weight[r].tolist(), sensitivity[r].tolist()
        every = []
        for side in itertools.product((0, 1), repeat=K):  # also parts that are no intervals
            parts = ([i for i in range(K) if side[i] == s] for s in (0, 1))
            every.append(sum(least([values[i] for i in part], [counts[i] for i in part]) for part in parts))
        assert float(found[r]) == pytest.approx(min(every), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("nesting", ["greedy", "joint"])
@pytest.mark.parametrize("seed_init", ["dp", "kmeans++"])
def test_every_table_holds_the_weighted_means_of_its_members_and_cost_falls_with_bits(nesting, seed_init):
    weight, sensitivity = heavy()
    clusters = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=5, nesting=nesting, seed_init=seed_init)
    assert list(clusters.tables) == [2, 3, 4, 5]
    costs = []
    for b, table in clusters.tables.items():
        codes = clusters.codes >> (5 - b)
        for r in range(len(weight)):
            for code in codes[r].unique().tolist():
                members = codes[r] == code
                mean = (sensitivity[r][members].double() * weight[r][members].double()).sum()
                mean /= sensitivity[r][members].double().sum()
                assert float(table[r, code]) == pytest.approx(float(mean), rel=1e-5, abs=1e-7)
        costs.append(cost(weight, sensitivity, clusters, b, 5))
    for above, below in itertools.pairwise(costs):
        assert (below <= above * (1 + 1e-9)).all()


def test_codes_follow_the_order_of_the_weights():
    weight, sensitivity = heavy()
    codes = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=4).codes
    assert (codes.gather(1, weight.argsort(1)).int().diff(dim=1) >= 0).all()


def test_each_border_of_greedy_nesting_is_kept_or_bettered_by_joint_nesting():
    for seed in range(3):
        weight, sensitivity = heavy(6, 90, seed)
        rows = sort_rows(weight, sensitivity)
        greedy = cluster_rows(weight, sensitivity, seed_bits=1, parent_bits=4)
        joint = cluster_rows(weight, sensitivity, seed_bits=1, parent_bits=4, nesting="joint")
        before = [cost(weight, sensitivity, greedy, b, 4) for b in range(1, 5)]
        after = [cost(weight, sensitivity, joint, b, 4) for b in range(1, 5)]
        relative = sum(a / b.clamp(min=1e-300) for a, b in zip(after, before, strict=True))
        assert (relative <= 4 + 1e-6).all()
        assert float(relative.mean()) < 3.97  # and it is of use
        assert rows.size == 90


def test_moved_borders_are_where_no_single_move_helps():
    weight, sensitivity = heavy(3, 14)
    rows = sort_rows(weight, sensitivity)
    alphas = torch.tensor([[1.0, 4.0, 16.0]] * 3, dtype=torch.float64)
    start = torch.tensor([[0, 1, 3, 4, 5, 9, 11, 13, 14]] * 3)

    def objective(borders, r):
        return sum(float(alphas[r, level] * gains(rows, coarser(borders, 2 - level))[r]) for level in range(3))

    moved = move_together(rows, start, 1, 3, alphas)
    for r in range(3):
        assert objective(moved, r) >= objective(start, r)
        for j in range(1, 8):
            for place in range(int(moved[r, j - 1]), int(moved[r, j + 1]) + 1):
                other = moved.clone()
                other[r, j] = place
                assert objective(other, r) <= objective(moved, r) * (1 + 1e-8)


def test_a_row_of_few_values_is_exact():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([-1.5, 0.0, 0.25, 3.0])
    weight = values[torch.randint(0, 4, (5, 40), generator=generator)]
    clusters = cluster_rows(weight, torch.rand(5, 40, generator=generator), seed_bits=2, parent_bits=4)
    for b in (2, 3, 4):
        assert torch.equal(clusters.tables[b].gather(1, (clusters.codes >> (4 - b)).long()).float(), weight)
    even = torch.linspace(-1, 1, 16)[torch.arange(48) % 16][None]
    clusters = cluster_rows(even, seed_bits=2, parent_bits=4)
    torch.testing.assert_close(clusters.tables[4].gather(1, clusters.codes.long()).float(), even)


def test_rows_of_zeros_of_one_value_and_without_sensitivity_have_finite_tables():
    weight = torch.stack([torch.zeros(9), torch.full((9,), 0.3), torch.arange(9.0)])
    sensitivity = torch.zeros(3, 9)
    clusters = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=4)
    plain = cluster_rows(weight, None, seed_bits=2, parent_bits=4)
    ones = torch.ones(3, 9)
    for b, table in clusters.tables.items():
        assert table.isfinite().all()
        costs = [cost(weight, ones, found, b, 4) for found in (clusters, plain)]
        torch.testing.assert_close(*costs)  # all of them count the same
    near = clusters.tables[2].gather(1, (clusters.codes >> 2).long()).float()
    torch.testing.assert_close(near[:2], weight[:2])


def test_a_matrix_of_one_input_is_exact():
    weight = torch.tensor([[0.7], [-2.0]])
    clusters = cluster_rows(weight, seed_bits=1, parent_bits=3)
    torch.testing.assert_close(clusters.tables[1].gather(1, (clusters.codes >> 2).long()).float(), weight)


def test_rows_are_clustered_alike_together_and_alone(monkeypatch):
    weight, sensitivity = heavy(7, 33)
    whole = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=4, nesting="joint")
    monkeypatch.setattr("trialist.weights.nested.quantize.AT_ONCE", 70)
    parts = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=4, nesting="joint")
    assert torch.equal(whole.codes, parts.codes)


def test_drawn_seeds_are_the_same_again_and_no_better_than_the_best():
    weight, sensitivity = heavy(6, 80)
    rows = sort_rows(weight, sensitivity)
    first, second = (drawn_seeds(rows, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    best = gains(rows, split(rows, split(rows, torch.tensor([[0, 80]] * 6))))
    exact = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=2)
    drawn = cluster_rows(weight, sensitivity, seed_bits=2, parent_bits=2, seed_init="kmeans++")
    assert (cost(weight, sensitivity, exact, 2, 2) <= cost(weight, sensitivity, drawn, 2, 2) * (1 + 1e-9)).all()
    assert (gains(rows, first) > 0.5 * best).all()


# ---- models ----

IDS = [torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 9, 17)]


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_squared_gradients_are_those_of_autograd_a_sequence_at_a_time(build):
    model = build()
    layers = {
        name: m for name, m in model.named_modules() if type(m) in (torch.nn.Linear, Conv1D) and name != "lm_head"
    }
    found = sensitivities(model, layers, IDS, "fisher")
    expected = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    model.eval()
    for ids in IDS:
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        for name, layer in layers.items():
            expected[name] += layer.weight.grad**2 / len(IDS)
    for name, value in found.items():
        turned = expected[name].T if isinstance(layers[name], Conv1D) else expected[name]
        torch.testing.assert_close(value, turned, rtol=1e-3, atol=float(turned.max()) * 1e-5)


def test_squared_inputs_are_means_over_tokens():
    model, seen = llama().eval(), []
    layer = model.model.layers[0].mlp.up_proj
    found = sensitivities(model, {"up": layer}, IDS[:1], "activation")["up"]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS[0][None])
    hook.remove()
    torch.testing.assert_close(found, (seen[0] ** 2).mean((0, 1)))


def test_a_model_is_left_as_it_was_by_the_search_for_sensitivities():
    model = llama()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    sensitivities(model, {"q": model.model.layers[0].self_attn.q_proj}, IDS, "fisher")
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("sensitivity", ["fisher", "activation", "none"])
def test_nested_layers_hold_what_their_weights_became(build, sensitivity):
    model = build().eval()
    dense = copy.deepcopy(model)
    config = NestedQuantConfig(seed_bits=2, parent_bits=4, sensitivity=sensitivity)
    report = quantize_nested(model, config, IDS)
    assert available_bits(model) == (2, 3, 4)
    assert get_precision(model) == 4
    wrong, whole = dict.fromkeys((2, 3, 4), 0.0), 0.0
    for name, layer in nested_layers(model).items():
        old = dense.get_submodule(name)
        weight = old.weight.T if isinstance(old, Conv1D) else old.weight
        codes = unpack_codes(layer.qweight, layer.in_features)
        assert codes.shape == weight.shape
        for b in (2, 3, 4):
            expected = layer.table(b).gather(1, (codes >> (4 - b)).long()).float()
            assert torch.equal(layer.dequantize(b), expected)
            wrong[b] += float((weight - expected).detach().square().sum())
        whole += float(weight.detach().square().sum())
    if sensitivity == "none":
        for b, error in report.error.items():
            assert error == pytest.approx(wrong[b] / whole, rel=1e-4)
    assert report.error[4] < report.error[3] < report.error[2] < 0.3
    x = IDS[0][None]
    with torch.no_grad():
        differences = []
        for b in (2, 3, 4):
            with precision(model, b):
                differences.append(float((model(x).logits - dense(x).logits).abs().mean()))
    assert differences == sorted(differences, reverse=True)


def test_bytes_are_those_of_all_tensors_and_of_a_precision_alone():
    model = llama(tie_word_embeddings=True)
    report = quantize_nested(model, NestedQuantConfig(sensitivity="none"))
    stored = nested_bytes(model)
    tensors = {x.data_ptr(): x for x in (*model.parameters(), *model.buffers())}
    assert stored.total == sum(x.nbytes for x in tensors.values())
    rows = sum(layer.out_features for layer in nested_layers(model).values())
    assert stored.tables == rows * 2 * (4 + 8 + 16)
    alone = nested_bytes(model, 3)
    assert alone.tables == rows * 2 * 8
    assert alone.codes * 4 == stored.codes * 3
    assert alone.untouched == stored.untouched
    assert report.left == {"lm_head": "the output layer, whose weights are those of the embedding"}
    assert report.bits_per_weight == pytest.approx(8 * (stored.codes + stored.tables) / report.weights)


def test_layers_that_are_named_stay_and_an_output_layer_may_get_codes_of_its_own():
    model = llama(tie_word_embeddings=True).eval()
    embedding = model.model.embed_tokens.weight
    before = embedding.detach().clone()
    config = NestedQuantConfig(sensitivity="none", parent_bits=8, modules_to_not_convert=["down_proj"])
    report = quantize_nested(model, config)
    assert set(report.left.values()) == {"named in modules_to_not_convert"}
    assert len(report.left) == 2
    assert "lm_head" in nested_layers(model)
    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    assert not model.config.tie_word_embeddings
    assert float((model.lm_head.dequantize() - before).abs().max().detach()) < 0.05 * float(before.abs().max().detach())


def test_what_cannot_be_quantised_is_refused_and_stays_as_it_was():
    model = llama()
    with pytest.raises(ValueError, match="needs calibration sequences"):
        quantize_nested(model, NestedQuantConfig())
    with pytest.raises(ValueError, match="no calibration sequences"):
        quantize_nested(model, NestedQuantConfig(), [])
    with pytest.raises(ValueError, match="calibration sequence 1 has no token to predict"):
        quantize_nested(model, NestedQuantConfig(), [IDS[0], IDS[0][:1]])
    with pytest.raises(ValueError, match="'nose', which is no linear layer of LlamaForCausalLM"):
        quantize_nested(model, NestedQuantConfig(sensitivity="none", modules_to_not_convert=["nose"]))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: 1 weights are not finite"):
        quantize_nested(model, NestedQuantConfig(sensitivity="none"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 7e4
    with pytest.raises(ValueError, match="use table_dtype='bfloat16'"):
        quantize_nested(model, NestedQuantConfig(sensitivity="none"))
    assert not nested_layers(model)
    with pytest.raises(ValueError, match="small gradients vanish in float16"):
        quantize_nested(llama().half(), NestedQuantConfig(), IDS)
    quantize_nested(model, NestedQuantConfig(sensitivity="none", table_dtype="bfloat16"))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_nested(model, NestedQuantConfig(sensitivity="none"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed_bits": 5}, "seed_bits is 5 and parent_bits 4"),
        ({"parent_bits": 9}, "parent_bits 9"),
        ({"nesting": "best"}, "nesting is 'best'; choose one of greedy, joint"),
        ({"calibration_samples": 0}, "calibration_samples must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        NestedQuantConfig(**settings)


def test_rounding_takes_the_nearest_of_each_even_grid():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0, 0.6, 0.0, 2.0]])
    near = round_to_nearest(weight, 2, 2)
    torch.testing.assert_close(near[0, :4], weight[0, :4])  # four values that are a grid
    grid = near[0, 4:].unique()
    steps = grid.diff()
    assert len(grid) <= 4
    assert torch.allclose(steps / steps.min(), (steps / steps.min()).round(), atol=1e-2)
    whole = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    errors = [float((round_to_nearest(whole, b, 2) - whole).square().sum()) for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="groups is 51; wanted 1 to 50"):
        round_to_nearest(whole, 2, 51)


def test_clusters_lose_less_than_even_grids_of_the_same_bytes():
    weight, sensitivity = heavy(20, 128)
    for b in (2, 3, 4):
        clusters = cluster_rows(weight, sensitivity, seed_bits=b, parent_bits=b)
        near = round_to_nearest(weight, b, 1 << (b - 1), sensitivity)
        rounded = (sensitivity * (weight - near).square()).sum()
        assert float(cost(weight, sensitivity, clusters, b, b).sum()) < float(rounded)
