from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from trialist.kernels.expert_lookup import expert_lookup
from trialist.models import PEER, flops_per_token
from trialist.models.configuration import SETTINGS
from trialist.models.peer.layer import check_peer, second_moment, shell_id, shell_pair
from trialist.optimizers import adamw

SMALL = {"hidden_size": 12, "num_experts": 49, "num_heads": 3, "top_k": 4, "key_dim": 6}


def layer(seed: int = 0, **changes) -> PEER:
    torch.manual_seed(seed)
    return PEER(**{**SMALL, **changes})


def naive(peer: PEER, x: Tensor) -> Tensor:
    """The paper's formula over all N experts for every token and head, in evaluation mode with the softmax score."""
    side, half = peer.side, peer.key_dim // 2
    keys = torch.cat(list(peer.keys), 1)
    u, v = torch.cat(list(peer.down)), torch.cat(list(peer.up))
    norm = peer.query_norm
    output = torch.zeros_like(x)
    for n, token in enumerate(x):
        queries = peer.query_proj.weight @ token
        queries = (queries - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        for query in queries.view(peer.num_heads, 2, half):
            scores = {
                (a, b): float(keys[0, a] @ query[0] + keys[1, b] @ query[1]) for a in range(side) for b in range(side)
            }
            best = sorted(scores, key=scores.get, reverse=True)[: peer.top_k]
            total = sum(math.exp(scores[pair]) for pair in best)
            for a, b in best:
                m = max(a, b)
                e = m * m + m + a - b
                output[n] += math.exp(scores[a, b]) / total * nn.functional.gelu(u[e] @ token) * v[e]
    return output


def test_the_layer_computes_the_papers_formula_over_all_experts() -> None:
    peer, x = layer(generations=[4, 7]).eval(), torch.randn(9, 12)
    with torch.no_grad():
        peer.query_norm.running_mean.normal_()
        peer.query_norm.running_var.uniform_(0.5, 2)
        peer.query_norm.weight.normal_()
        torch.testing.assert_close(peer(x), naive(peer, x), rtol=1e-4, atol=1e-5)


def test_with_all_experts_and_equal_weights_it_is_a_dense_mlp_of_width_n() -> None:
    peer, x = layer(num_experts=16, top_k=16, num_heads=1).eval(), torch.randn(9, 12)
    ids, weights = peer.retrieve(x)
    assert all(sorted(row) == list(range(16)) for row in ids[:, 0].tolist())
    y = expert_lookup(x, ids[:, 0], torch.ones_like(weights[:, 0]), list(peer.down), list(peer.up))
    torch.testing.assert_close(y, nn.functional.gelu(x @ peer.down[0].T) @ peer.up[0])


def test_with_one_expert_a_head_it_is_an_mlp_of_gathered_neurons() -> None:
    peer, x = layer(top_k=1, score="relu").eval(), torch.randn(9, 12)
    ids, weights = (tensor.flatten(-2) for tensor in peer.retrieve(x))
    hidden = nn.functional.gelu((peer.down[0][ids] * x[:, None]).sum(-1))
    torch.testing.assert_close(peer(x), ((weights * hidden)[..., None] * peer.up[0][ids]).sum(1))


def test_permuting_sub_keys_with_their_experts_leaves_the_output_unchanged() -> None:
    peer, x = layer(glu=True).eval(), torch.randn(9, 12)
    expected = peer(x)
    order = torch.randperm(7)
    a, b = shell_pair(torch.arange(49))
    sources = shell_id(order[a], order[b])  # the expert that now stands at (a, b) stood at (order[a], order[b])
    with torch.no_grad():
        peer.keys[0].copy_(peer.keys[0][:, order])
        for table in (peer.down[0], peer.up[0], peer.gate[0]):
            table.copy_(table[sources])
    torch.testing.assert_close(peer(x), expected)


@pytest.mark.parametrize("side", [1, 2, 3, 50, 200])
def test_shell_ids_number_the_pairs_below_a_side_without_gaps(side: int) -> None:
    a, b = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = shell_id(a, b).flatten()
    assert torch.equal(ids.sort().values, torch.arange(side**2))
    assert all(torch.equal(found, given.flatten()) for found, given in zip(shell_pair(ids), (a, b)))


def test_shell_pairs_of_large_ids_survive_rounding() -> None:
    for m in (2**20, 2**26 + 1, 94_906_267):
        ids = torch.tensor([m * m - 1, m * m, m * m + m - 1, m * m + m, m * m + 2 * m])
        assert torch.equal(shell_id(*shell_pair(ids)), ids)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu"])
def test_weights_are_the_score_of_the_chosen_keys(score: str) -> None:
    peer, x = layer(score=score, query_norm="none"), torch.randn(5, 12)
    ids, weights = peer.retrieve(x)
    a, b = shell_pair(ids)
    queries = peer.query_proj(x).view(5, 3, 1, 2, 3)
    raw = (queries[..., 0, :] * peer.keys[0][0][a]).sum(-1) + (queries[..., 1, :] * peer.keys[0][1][b]).sum(-1)
    expected = {"softmax": raw.softmax(-1), "sigmoid": raw.sigmoid(), "relu": raw.relu()}[score]
    torch.testing.assert_close(weights, expected)


def test_the_score_is_the_only_way_of_gradients_to_keys_and_queries_and_it_is_exact() -> None:
    peer, x = layer(backend="embedding_bag", query_norm="layernorm").double(), torch.randn(5, 12, dtype=torch.float64)
    keys = peer.keys[0]
    upstream = torch.randn(5, 12, dtype=torch.float64)
    (peer(x) * upstream).sum().backward()
    chosen = peer.retrieve(x)[0]
    for place in ((0, 2, 1), (1, 5, 0), (0, 6, 2)):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                keys[place] += step
                assert torch.equal(peer.retrieve(x)[0].sort(-1).values, chosen.sort(-1).values)
                values.append(float((peer(x) * upstream).sum()))
                keys[place] -= step
        assert float(keys.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)
    assert peer.query_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("query_norm", ["batchnorm", "layernorm", "none"])
def test_in_evaluation_no_token_depends_on_another(query_norm: str) -> None:
    peer, x = layer(query_norm=query_norm).eval(), torch.randn(2, 6, 12)
    changed = x.clone()
    changed[:, 3] += 1
    before, after = peer(x), peer(changed)
    assert torch.equal(before[:, [0, 1, 2, 4, 5]], after[:, [0, 1, 2, 4, 5]])
    assert not torch.equal(before[:, 3], after[:, 3])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_stands_at_padding_never_matters(training: bool) -> None:
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    x = torch.randn(2, 6, 12)
    outputs = []
    for noise in (0.0, 100.0):
        peer = layer().train(training)
        outputs.append([peer(x + noise * ~mask[..., None], mask)[mask], peer.query_norm.running_var.clone()])
    torch.testing.assert_close(*outputs)
    peer = layer().train(training)
    torch.testing.assert_close(outputs[0][0], peer(x[mask]))
    torch.testing.assert_close(outputs[0][1], peer.query_norm.running_var)


def test_query_heads_share_keys_and_experts() -> None:
    names = {name: tuple(p.shape) for name, p in layer(glu=True, generations=[2, 7]).named_parameters()}
    assert (names["keys.0"], names["keys.1"]) == ((2, 2, 3), (2, 5, 3))
    assert all(names[f"{table}.0"] == (4, 12) and names[f"{table}.1"] == (45, 12) for table in ("down", "up", "gate"))
    assert names["query_proj.weight"] == (18, 12)


@pytest.mark.parametrize("changes", [{}, {"glu": True}, {"score": "sigmoid"}, {"activation": "relu", "num_heads": 8}])
def test_the_initial_output_is_as_large_as_asked_for(changes: dict) -> None:
    torch.manual_seed(0)
    peer = PEER(
        **{"hidden_size": 64, "num_experts": 4096, "num_heads": 4, "top_k": 8, "key_dim": 32, **changes}, output_std=0.3
    )
    spread = peer(torch.randn(2000, 64)).std().item()
    assert spread == pytest.approx(0.3, rel=0.1 if peer.score == "softmax" else 0.35)


def test_second_moments_of_activations_have_their_closed_forms() -> None:
    assert second_moment("relu") == pytest.approx(0.5, rel=1e-6)
    assert second_moment("relu", 3.0) == pytest.approx(4.5, rel=1e-6)
    z = torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert second_moment("gelu") == pytest.approx(nn.functional.gelu(z).square().mean().item(), rel=0.01)


def test_bfloat16_layers_route_in_float32_and_give_bfloat16() -> None:
    peer, x = layer().to(torch.bfloat16), torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    y = peer(x)
    assert (y.dtype, peer.retrieve(x)[1].dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in peer.parameters())


def test_the_backends_agree_on_the_whole_layer() -> None:
    x, found = torch.randn(11, 12), []
    for backend in ("auto", "embedding_bag", "einsum"):
        peer = layer(backend=backend, glu=True, generations=[3, 7])
        y = peer(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in peer.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_flops_count_projection_scores_and_experts() -> None:
    assert flops_per_token(layer(), 10) == 2 * 12 * 18 + 2 * 3 * 6 * (7 + 4) + 4 * 12 * 12
    assert flops_per_token(layer(glu=True), 10) - flops_per_token(layer(), 10) == 2 * 12 * 12


def test_tables_have_a_learning_rate_of_their_own_and_do_not_decay() -> None:
    peer = layer(learning_rate_scale=8.0, glu=True)
    optimizer = adamw(peer, 1e-3, weight_decay=0.1)
    groups = {group.get("name", "other"): group for group in optimizer.param_groups if group.get("name")}
    assert {id(p) for p in groups["peer_experts"]["params"]} == {id(peer.down[0]), id(peer.up[0]), id(peer.gate[0])}
    assert (groups["peer_experts"]["lr"], groups["peer_experts"]["weight_decay"]) == (pytest.approx(8e-3), 0.0)
    assert (groups["peer_keys"]["lr"], groups["peer_keys"]["weight_decay"]) == (1e-3, 0.0)
    assert peer.query_proj.weight in set(optimizer.param_groups[0]["params"])


def test_sparse_gradients_are_refused_by_adamw_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"peer_experts.*sparse.*RowAdagrad"):
        adamw(layer(sparse_grad=True), 1e-3)


def test_sparse_and_dense_gradients_are_the_same() -> None:
    x, found = torch.randn(11, 12), []
    for sparse in (False, True):
        peer = layer(sparse_grad=sparse)
        peer(x).square().sum().backward()
        assert peer.up[0].grad.is_sparse is sparse
        found.append([p.grad.to_dense() for p in peer.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 50}, "num_experts is 50; product keys need a perfect square: 49 or 64"),
        ({"num_experts": 0}, "perfect square"),
        ({"key_dim": 7}, "key_dim is 7; it must be even"),
        ({"top_k": 50}, "top_k is 50, but there are only 49 experts"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be an int"),
        ({"num_experts": 49.0}, "num_experts is 49.0; it must be an int"),
        ({"key_dim": 6.0}, "key_dim is 6.0; it must be even"),
        ({"generations": [3.0, 7]}, "growing sides"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"top_k": 1}, "softmax over top_k=1 score is always 1"),
        ({"score": "tanh"}, "softmax, sigmoid, relu"),
        ({"query_norm": "rms"}, "batchnorm, layernorm, none"),
        ({"activation": "tanh"}, "gelu, relu, silu"),
        ({"backend": "cuda"}, "embedding_bag"),
        ({"generations": [3, 5]}, "ends with that of all 49 experts, 7"),
        ({"generations": [7, 7]}, "growing sides"),
        ({"learning_rate_scale": 0.0}, "learning_rate_scale is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**changes)


def test_input_that_is_not_a_number_is_refused_in_words() -> None:
    x = torch.randn(5, 12)
    x[2, 3] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        layer().eval()(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_padding_may_hold_what_is_no_number(training: bool, content: float) -> None:
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    x, found = torch.randn(2, 6, 12), []
    for filling in (0.0, content):
        peer, given = layer().train(training), torch.where(mask[..., None], x, filling).requires_grad_()
        y = peer(given, mask)
        y[mask].square().sum().backward()
        found.append([y[mask], given.grad, *(p.grad for p in peer.parameters()), *peer.buffers()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (2, 0, 12), (2, 3, 5, 12)])
def test_any_number_of_leading_dimensions_will_do(shape: tuple[int, ...]) -> None:
    peer, x = layer().eval(), torch.randn(shape)
    expected = [peer(token[None])[0] for token in x.reshape(-1, 12)]
    torch.testing.assert_close(peer(x), torch.stack(expected).view(shape) if expected else torch.empty(shape))


def test_input_of_another_width_is_refused() -> None:
    for x in (torch.randn(2, 5, 24), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"wanted \(..., 12\)"):
            layer()(x)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 4, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool), torch.ones(2, 5, dtype=torch.long)],
    ids=["other length", "transposed", "integers"],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"does not fit x \(2, 5, 12\): wanted \(2, 5\) of torch.bool"):
        layer()(torch.randn(2, 5, 12), mask)


def test_layer_check_and_configuration_know_the_same_settings_with_the_same_defaults() -> None:
    def defaults(function) -> dict:
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    known = {name: value for name, value in defaults(PEER).items() if name not in ("hidden_size", "output_std")}
    assert defaults(check_peer) == known
    assert SETTINGS["peer"] == known
    assert set(PEER(**SMALL).settings) == set(known)
