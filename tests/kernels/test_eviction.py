from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trialist.kernels.eviction import available, evict, keep_index

needs_compiler = pytest.mark.skipif(not available(), reason="no C compiler: the C kernel cannot be built")
BACKENDS = ["reference", pytest.param("c", marks=needs_compiler)]
backends = pytest.mark.parametrize("backend", BACKENDS)


def loops(scores, alive, queries, first, budget, increments, logits, visible, protect, recent):  # type: ignore[no-untyped-def]
    """The definition, entry by entry, in float64: rows seen, and per row the scores and survivors."""
    N, S = scores.shape
    rows = torch.zeros(N, queries, S, dtype=torch.bool)
    ends: list[tuple[dict[int, float], list[int]]] = []
    for n in range(N):
        living = [j for j in range(first) if alive[n, j]]
        score = {j: float(scores[n, j]) for j in range(S)}
        for t in range(queries):
            own = first + t
            if visible is not None and not visible[n, t, own]:
                continue
            living.append(own)
            look = [j for j in living if visible is None or visible[n, t, j]]
            rows[n, t, look] = True
            if increments is not None:
                for j in look:
                    score[j] += float(increments[n, t, j])
            for h in range(0 if logits is None else logits.shape[1]):
                weights = {j: math.exp(float(logits[n, h, t, j])) for j in look}
                for j in look:
                    score[j] += weights[j] / sum(weights.values())
            while len(look) > budget:
                may_go = [j for j in look[: len(look) - recent] if not protect[n, j]]
                if not may_go:
                    break
                sign = 1 if logits is None else -1
                gone = max(may_go, key=lambda j: (sign * score[j], -j))
                look.remove(gone)
                living.remove(gone)
        ends.append((score, living))
    return rows, ends


def problem(seed: int, N: int = 3) -> dict:
    g = torch.Generator().manual_seed(seed)
    S, first = 5 + seed % 7, seed % 4
    T = S - first
    visible = torch.ones(T, S, dtype=torch.bool).tril(first).repeat(N, 1, 1)
    visible[1, :, : 1 + seed % 3] = False  # padding on the left
    visible[2, :, min(3, S - 1)] = False  # and inside
    return {
        "scores": torch.rand(N, S, generator=g), "alive": torch.rand(N, S, generator=g) > 0.2, "queries": T, "first": first,
        "visible": visible if seed % 2 else None, "protect": torch.rand(N, S, generator=g) > 0.8,
        "budget": 2 + seed % 4, "recent": 1 + seed % 2,
        "increments": torch.rand(N, T, S, generator=g).sub(0.5).relu(),
        "logits": 3 * torch.randn(N, 2, T, S, generator=g),
    }  # fmt: skip


@backends
@pytest.mark.parametrize("scored_by", ["increments", "logits", "nothing"])
@pytest.mark.parametrize("seed", range(12))
def test_both_backends_play_the_definition_through(backend: str, scored_by: str, seed: int) -> None:
    given = problem(seed)
    for name in ("increments", "logits"):
        if name != scored_by:
            given[name] = None
    rows, ends = loops(**given)
    scores, alive = given.pop("scores"), given.pop("alive")
    seen, after, living = evict(scores, alive, **given, backend=backend)
    assert torch.equal(seen, rows)
    for n, (score, survivors) in enumerate(ends):
        assert living[n].nonzero().flatten().tolist() == survivors
        expected = torch.tensor([score[j] for j in survivors], dtype=torch.float64)
        torch.testing.assert_close(after[n, survivors].double(), expected, atol=1e-5, rtol=1e-5)


@backends
def test_blocks_of_queries_hand_over_what_is_alive_and_scored(backend: str) -> None:
    given = problem(7)
    scores, alive, T, first = given["scores"], given["alive"], given["queries"], given["first"]
    options = {name: given[name] for name in ("budget", "protect", "recent")}
    whole = evict(scores, alive, queries=T, first=first, logits=given["logits"], backend=backend, **options)
    rows = []
    for start in range(0, T, 2):
        part = slice(start, min(start + 2, T))
        seen, scores, alive = evict(
            scores, alive, queries=part.stop - start, first=first + start, logits=given["logits"][:, :, part],
            backend=backend, **options,
        )  # fmt: skip
        rows.append(seen)
    assert torch.equal(torch.cat(rows, 1), whole[0])
    assert torch.equal(alive, whole[2])
    torch.testing.assert_close(scores[alive], whole[1][alive])


@backends
def test_a_budget_that_is_lowered_between_calls_is_met_at_once(backend: str) -> None:
    scores = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0, 0.0]])
    alive = torch.ones(1, 7, dtype=torch.bool)
    seen, _, living = evict(scores, alive, queries=1, first=6, budget=3, backend=backend)
    assert seen.all()
    assert living.tolist() == [[True, False, True, False, False, False, True]]


@backends
def test_protected_columns_stay_even_beyond_the_budget(backend: str) -> None:
    protect = torch.tensor([[True, True, True, False]])
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    _, _, living = evict(zeros, ones, queries=1, first=3, budget=2, protect=protect, backend=backend)
    assert living.all()


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 60, 60, generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            zeros, none = torch.zeros(5, 60), torch.zeros(5, 60, dtype=torch.bool)
            found.append(evict(zeros, none, queries=60, first=0, budget=9, logits=logits, recent=4, backend="c"))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_inputs_are_left_as_they_were_and_carry_no_gradient() -> None:
    scores = torch.rand(2, 6, requires_grad=True)
    alive, increments = torch.ones(2, 6, dtype=torch.bool), torch.rand(2, 6, 6, requires_grad=True)
    copies = scores.detach().clone(), alive.clone()
    _, after, _ = evict(scores, alive, queries=6, first=0, budget=3, increments=increments)
    assert torch.equal(scores.detach(), copies[0])
    assert torch.equal(alive, copies[1])
    assert not after.requires_grad


def test_the_operator_passes_the_checks_of_torch_library() -> None:
    given = problem(3)
    arguments = (given["scores"], given["alive"], given["increments"], None, given["visible"], given["protect"],
                 given["queries"], given["first"], 3, 1, "auto")  # fmt: skip
    torch.library.opcheck(torch.ops.trialist.evict.default, arguments)


@pytest.mark.parametrize("keep", [1, 2, 4, 5])
def test_kept_indices_are_those_of_lowest_priority_and_the_newest_of_equals(keep: int) -> None:
    priority = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    going = [[1, 3, 2, 0, 4], [0, 1, 2, 3, 4]]
    expected = [sorted(order[5 - keep :]) for order in going]
    assert keep_index(priority, keep).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 2, "recent": 3}, "1 <= recent <= budget"),
        ({"logits": torch.zeros(3, 1, 4, 6), "increments": torch.zeros(3, 4, 6)}, "two ways to score"),
        ({"increments": torch.zeros(3, 5, 6)}, r"increments has shape \(3, 5, 6\)"),
        ({"queries": 7}, "7 queries from column 2 on do not fit"),
        ({"backend": "cuda"}, "choose one of auto, reference, c"),
        ({"backend": "c", "scores": torch.zeros(3, 6, dtype=torch.float64)}, "float32 scores on the CPU"),
    ],
)
def test_bad_arguments_are_named(changes: dict, words: str) -> None:
    given: dict[str, Tensor | int | str] = {"scores": torch.zeros(3, 6), "alive": torch.ones(3, 6, dtype=torch.bool)}
    given |= {"queries": 4, "first": 2, "budget": 3} | changes
    with pytest.raises(ValueError, match=words):
        evict(**given)  # type: ignore[arg-type]
