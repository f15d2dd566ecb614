from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trialist.models.peer.query_norm import QueryBatchNorm, QueryLayerNorm


def batch_norm(seed: int = 0) -> QueryBatchNorm:
    torch.manual_seed(seed)
    norm = QueryBatchNorm(3, 4)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def by_torch(norm: QueryBatchNorm) -> nn.BatchNorm1d:
    reference = nn.BatchNorm1d(12)
    reference.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return reference


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_over_real_tokens_it_is_batch_norm_with_its_gradients_and_running_statistics(masked: bool) -> None:
    norm, x = batch_norm(), torch.randn(11, 12, dtype=torch.float64)
    norm.double()
    reference = by_torch(norm).double()
    mask = torch.arange(11) % 3 > 0 if masked else None
    real = slice(None) if mask is None else mask
    for _ in range(3):
        ours, theirs = x.clone().requires_grad_(), x[real].clone().requires_grad_()
        upstream = torch.randn(11, 12, dtype=torch.float64)
        output, expected = norm(ours, mask), reference(theirs)
        torch.testing.assert_close(output[real], expected)
        output[real].backward(upstream[real])
        expected.backward(upstream[real])
        torch.testing.assert_close(ours.grad[real], theirs.grad)
        torch.testing.assert_close(norm.running_mean, reference.running_mean)
        torch.testing.assert_close(norm.running_var, reference.running_var)
        x = x * 1.5 + 1
    torch.testing.assert_close(norm.weight.grad, reference.weight.grad)
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("masked", [False, True], ids=["one token", "one real token"])
def test_a_single_token_is_normed_by_the_running_statistics_which_stay(masked: bool) -> None:
    norm = batch_norm()
    norm(torch.randn(30, 12) * 3 + 1)
    kept = norm.running_mean.clone()
    x = torch.randn(3 if masked else 1, 12)
    mask = torch.tensor([False, True, False]) if masked else None
    training = norm(x, mask)
    assert torch.equal(norm.running_mean, kept)
    torch.testing.assert_close(training, norm.eval()(x, mask))


@pytest.mark.parametrize("first", ["one token", "evaluation", "frozen"])
@pytest.mark.parametrize("turned", [False, True], ids=["before", "after"])
def test_a_pass_by_running_statistics_beside_a_training_pass_has_the_gradients_of_each_alone(
    first: str, turned: bool
) -> None:
    inputs = torch.randn(1 if first == "one token" else 7, 12), torch.randn(11, 12)
    found = []
    for together in (True, False):
        norm, by_running, by_batch = batch_norm(), *(x.clone().requires_grad_() for x in inputs)
        losses = []
        for training in (True, False) if turned else (False, True):
            norm.train(training or first != "evaluation").requires_grad_(training or first != "frozen")
            losses.append((norm(by_batch if training else by_running).square()).sum())
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        found.append([by_running.grad, by_batch.grad])
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_a_compiled_norm_inside_checkpointing_counts_a_batch_once() -> None:
    x, found = torch.randn(11, 12), []
    for compiled in (False, True):
        norm, inputs = batch_norm(), x.clone().requires_grad_()
        if compiled:
            norm.compile(backend="aot_eager")
        checkpoint(norm, inputs, use_reentrant=False).square().sum().backward()
        found.append([inputs.grad, norm.running_mean, norm.running_var])
    torch.testing.assert_close(*found)


def test_frozen_it_is_what_it_is_in_evaluation() -> None:
    norm, x = batch_norm(), torch.randn(7, 12)
    norm(torch.randn(30, 12) * 3 + 1)
    norm.requires_grad_(False)
    kept = norm.running_var.clone()
    training = norm(x)
    assert torch.equal(norm.running_var, kept)
    assert torch.equal(training, norm.eval()(x))


def test_checkpointing_counts_a_batch_once_and_changes_no_gradient() -> None:
    x, found = torch.randn(11, 12), []
    for mask in (None, torch.arange(11) > 2):
        for again in (False, True):
            norm, inputs = batch_norm(), x.clone().requires_grad_()
            output = checkpoint(norm, inputs, mask, use_reentrant=False) if again else norm(inputs, mask)
            output.square().sum().backward()
            found.append([inputs.grad, norm.running_mean.clone(), norm.running_var.clone()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[3], rtol=0, atol=0)


def test_bfloat16_statistics_are_kept_in_bfloat16_and_used_in_float32() -> None:
    norm = batch_norm().to(torch.bfloat16)
    assert norm(torch.randn(9, 12)).dtype == torch.float32
    assert norm.running_mean.dtype == torch.bfloat16
    assert norm.running_mean.any()


def test_layer_norm_is_over_each_query_with_a_scale_of_its_head() -> None:
    norm, x = QueryLayerNorm(3, 4), torch.randn(5, 12)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    for n in range(5):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            expected = nn.functional.layer_norm(x[n, part], (4,), norm.weight[part], norm.bias[part])
            torch.testing.assert_close(norm(x)[n, part], expected)
