"""Budget forcing within one call of `generate`: a logits processor that stands last, and follows every sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

from trialist.decoding.budget_forcing.state import Pieces, Rules, State, Thinking

# R rows (prompts, or prompts times hypotheses), T tokens so far, V vocabulary


class Unforced(LogitsProcessor):
    """The first of all processors: remembers the model's own scores, for rows in which the others leave nothing but an end."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.scores = scores
        return scores


class FinishedRows(StoppingCriteriaList):
    """Stopping criteria that note at which length each row has met one, so that what pads a row is no token of it."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        done = super().__call__(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = torch.full_like(done, torch.iinfo(torch.long).max, dtype=torch.long)
        if self.lengths.shape == done.shape:
            self.lengths = self.lengths.where(~done | (self.lengths <= input_ids.shape[1]), input_ids.shape[1])
        return done


@dataclass
class Node:
    """A hypothesis: its state, and the states of those that go on from it by one token."""

    state: State
    children: dict[int, Node] = field(default_factory=dict)


class Forcing(LogitsProcessor):
    """Forces the strings of `rules` and puts off ends, row by row.

    input_ids: the prompts `(R, T)`, as the loop begins with them.   prompts: their texts.
    do_sample: whether the loop draws the next token from the scores that it is given; else it takes the largest.
    num_beams: hypotheses of a prompt; their rows lie next to each other and change places from step to step.
    finished: criteria of the loop, for one hypothesis a row.
    """

    def __init__(
        self, rules: Rules, pieces: Pieces, input_ids: Tensor, prompts: list[str], *, do_sample: bool, num_beams: int,
        unforced: Unforced, finished: FinishedRows | None,
    ) -> None:  # fmt: skip
        self.rules, self.pieces, self.do_sample, self.num_beams = rules, pieces, do_sample, num_beams
        self.unforced, self.finished = unforced, finished
        self.prompt_length = self.seen = input_ids.shape[1]
        self.ids = input_ids
        self.last = input_ids[:, -1].tolist() if self.seen else [None] * len(input_ids)
        self.nodes = [Node(rules.first(text)) for text in prompts]
        if num_beams > 1:  # hypotheses of a prompt begin as one
            self.nodes = [self.nodes[row - row % num_beams] for row in range(len(prompts))]
        self.roots = self.nodes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._follow(input_ids)
        states = [node.state for node in self.nodes]
        proposed: list[int | None] = [None] * len(states)
        if any(self.rules.undecided(state) for state in states):
            proposed = (_drawn(scores) if self.do_sample else scores.argmax(-1)).tolist()
        forced: list[tuple[int, int]] = []
        banned: list[tuple[int, int]] = []
        decided: dict[int, tuple[int | None, frozenset[int]]] = {}
        for row, node in enumerate(self.nodes):
            if id(node) not in decided:  # several rows of a prompt are one hypothesis in the first step
                node.state, token, without = self.rules.plan(node.state, proposed[row], self.last[row])
                decided[id(node)] = token, without
            token, without = decided[id(node)]
            if token is not None:
                forced.append((row, token))
            banned += [(row, other) for other in without if other < scores.shape[-1]]
        return self._changed(scores, forced, banned)

    def _changed(self, scores: Tensor, forced: list[tuple[int, int]], banned: list[tuple[int, int]]) -> Tensor:
        if not forced and not banned:
            return scores
        changed = scores.clone()
        if banned:
            rows, tokens = torch.tensor(banned, device=scores.device).T
            changed[rows, tokens] = -torch.inf
            empty = rows.unique()
            empty = empty[~changed[empty].isfinite().any(-1)]
            if len(empty) and self.unforced.scores is not None:
                # top-k or top-p left nothing but the end: the model's best other token
                own = self.unforced.scores[empty].to(changed.dtype, copy=True)
                where = (rows[:, None] == empty).nonzero()
                own[where[:, 1], tokens[where[:, 0]]] = -torch.inf
                changed[empty, own.argmax(-1)] = 0.0
        if forced:
            rows, tokens = torch.tensor(forced, device=scores.device).T
            changed[rows] = -torch.inf
            changed[rows, tokens] = 0.0  # also among beams: what is forced says nothing of a hypothesis
        return changed

    def _follow(self, input_ids: Tensor) -> None:
        """The nodes of the rows that `input_ids` holds now, one token behind those of the last call."""
        length = input_ids.shape[1]
        if length == self.seen:
            return
        if length != self.seen + 1:
            raise RuntimeError(
                f"budget forcing follows tokens one by one, and the loop went from {self.seen} tokens to {length}; use greedy "
                "search, sampling or beams"
            )
        tokens = input_ids[:, -1].tolist()
        if self.num_beams > 1:
            self.nodes = [self.nodes[parent] for parent in self._parents(input_ids)]
        ended = (
            self.finished.lengths.tolist() if self.finished is not None and self.finished.lengths is not None else None
        )
        for row, token in enumerate(tokens):
            if ended is None or length <= ended[row]:
                self.nodes[row] = self._child(self.nodes[row], token)
        self.seen, self.ids, self.last = length, input_ids, tokens

    def _child(self, node: Node, token: int) -> Node:
        if self.num_beams == 1:
            return Node(self.rules.follow(node.state, token, self.pieces))
        if token not in node.children:
            node.children[token] = Node(self.rules.follow(node.state, token, self.pieces))
        return node.children[token]

    def _parents(self, input_ids: Tensor) -> list[int]:
        """The row of the last call that each row goes on from."""
        K = self.num_beams
        now = input_ids[:, self.prompt_length : -1].unflatten(0, (-1, K))  # (R / K, K, t)
        before = self.ids[:, self.prompt_length :].unflatten(0, (-1, K))
        same = (now[:, :, None] == before[:, None]).all(-1)  # (R / K, K, K)
        if not bool(same.any(-1).all()):
            raise RuntimeError(
                "budget forcing lost track of the beams: a hypothesis goes on from none of the last step"
            )
        first = torch.arange(0, len(input_ids), K, device=input_ids.device)[:, None]
        return (same.int().argmax(-1) + first).flatten().tolist()

    def reports(self, sequences: Tensor) -> list[Thinking]:
        """One for each of the sequences `(N, T)` that the loop returned."""
        if self.num_beams == 1:
            if sequences.shape[1] == self.seen + 1:
                self._follow(sequences)
            return [node.state.report for node in self.nodes]
        each = len(sequences) // (len(self.roots) // self.num_beams)
        found = []
        for row, tokens in enumerate(sequences[:, self.prompt_length :].tolist()):
            node = self.roots[row // each * self.num_beams]
            for token in tokens:
                if node.state.phase == "finished" or (node.state.phase == "before" and token in self.rules.eos):
                    break
                node = self._child(node, token)
            found.append(node.state.report)
        return found


def _drawn(scores: Tensor) -> Tensor:
    """The token of each row that sampling is about to draw from these scores, (R,): the same draw, made ahead.

    The generator stays where it was, so that rows that are left alone get exactly these tokens, and where an end is put off or
    replaced, that happens with the probability which sampling gives it.
    """
    devices = [scores.device] if scores.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
