"""A generated world of facts: statements to pretrain on, and questions in a form that statements never have.

It takes apart what a model knows (facts, learned from statements) and how it answers (the form of question and answer,
learned from a few questions): the setting in which post-training is transferred to a base that knows more.
"""

# B rows, T tokens, E entities, R relations

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

BOS, STOP, IS, OF, QUESTION, ANSWER, END = range(7)
"""Tokens of form; QUESTION, ANSWER and END stand in questions only"""


@dataclass(frozen=True)
class FactWorld:
    """Entities with a first and a last name, and one value for each of their relations, drawn from `seed`.

    Token ids: the seven of form, first names, last names, relations, values. The first `old` entities are the old world;
    the others are new. Every name is borne by entities of both, so a new entity is no new token.
    """

    seed: int
    old: int = 96
    new: int = 96
    relations: int = 3
    values: int = 12
    names: int = 16

    def __post_init__(self) -> None:
        if self.old < 2 or self.new < 2 or self.relations < 1 or self.values < 2:
            raise ValueError(
                "at least 2 old and 2 new entities, 1 relation and 2 values are needed, not "
                f"{self.old}, {self.new}, {self.relations} and {self.values}"
            )
        if self.old + self.new > self.names**2:
            raise ValueError(
                f"{self.names} first and last names make {self.names**2} entities, fewer than the {self.old + self.new} wanted"
            )

    @property
    def size(self) -> int:
        """Token ids in use."""
        return 7 + 2 * self.names + self.relations + self.values

    @cached_property
    def entities(self) -> np.ndarray:
        """Tokens of first and last name, (E, 2)."""
        chosen = np.random.default_rng([self.seed, 0]).permutation(self.names**2)[: self.old + self.new]
        return np.stack([7 + chosen // self.names, 7 + self.names + chosen % self.names], axis=1)

    @cached_property
    def facts(self) -> np.ndarray:
        """Token of the value, (E, R)."""
        draw = np.random.default_rng([self.seed, 1])
        first = 7 + 2 * self.names + self.relations
        return first + draw.integers(self.values, size=(self.old + self.new, self.relations))

    def part(self, name: str) -> np.ndarray:
        """Numbers of the entities of a part: `old`, `new`, or one of the parts that questions are asked about.

        `taught`: half of the old ones, for fine-tuning. `old-validation` and `old-test` halve the rest, `new-validation` and
        `new-test` the new ones; nobody is taught these.
        """
        half, quarter = self.old // 2, self.old // 2 + (self.old - self.old // 2) // 2
        new = self.old + self.new // 2
        bounds = {
            "old": (0, self.old), "new": (self.old, self.old + self.new), "taught": (0, half),
            "old-validation": (half, quarter), "old-test": (quarter, self.old), "new-validation": (self.old, new),
            "new-test": (new, self.old + self.new),
        }  # fmt: skip
        return np.arange(*bounds[name])

    def statements(self, rows: int, length: int, parts: Sequence[str], generator: np.random.Generator) -> Tensor:
        """BOS and statements, cut off at `length`: `input_ids` (B, T). A part is drawn first, then an entity of it.

        A statement is `first last relation value STOP` or, as often, `relation OF first last IS value STOP`.
        """
        count = rows * -(-length // 5)
        part = generator.integers(len(parts), size=count)
        pools = [self.part(name) for name in parts]
        entity = np.array([pools[which][generator.integers(len(pools[which]))] for which in part])
        relation = generator.integers(self.relations, size=count)
        reverse = generator.random(count) < 0.5
        names, value = self.entities[entity], self.facts[entity, relation]
        token = 7 + 2 * self.names + relation
        tokens = np.full((rows, length), BOS)
        at = iter(range(count))
        for row in tokens:
            place = 1
            while place < length:
                n = next(at)
                (first, last), r, v = names[n], token[n], value[n]
                words = [r, OF, first, last, IS, v, STOP] if reverse[n] else [first, last, r, v, STOP]
                row[place : place + len(words)] = words[: length - place]
                place += len(words)
        return torch.from_numpy(tokens)

    def questions(self, part: str) -> dict[str, Tensor]:
        """Every fact of a part asked: `input_ids` and `labels`, (facts, 8): BOS QUESTION relation first last ANSWER value END.

        The value and END are the answer; `labels` is -100 elsewhere.
        """
        chosen = self.part(part)
        entity, relation = (grid.ravel() for grid in np.meshgrid(chosen, np.arange(self.relations), indexing="ij"))
        form = [np.full(len(entity), token) for token in (BOS, QUESTION, ANSWER, END)]
        names = self.entities[entity]
        columns = [
            form[0], form[1], 7 + 2 * self.names + relation, names[:, 0], names[:, 1], form[2], self.facts[entity, relation],
            form[3],
        ]  # fmt: skip
        tokens = torch.from_numpy(np.stack(columns, axis=1))
        labels = tokens.clone()
        labels[:, :-2] = IGNORED
        return {"input_ids": tokens, "labels": labels}


@dataclass(frozen=True)
class StatementBatches:
    """The batch of statements at a step, a function of seed and step alone."""

    world: FactWorld
    parts: tuple[str, ...]
    batch_size: int
    length: int
    seed: int

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (B, T); every token but the first counts."""
        generator = np.random.default_rng([self.seed, step])
        tokens = self.world.statements(self.batch_size, self.length, self.parts, generator)
        return {"input_ids": tokens, "labels": tokens.clone()}


@dataclass(frozen=True)
class QuestionBatches:
    """The batch of questions about a part at a step, drawn with replacement; a function of seed and step alone."""

    world: FactWorld
    part: str
    batch_size: int
    seed: int

    @cached_property
    def pool(self) -> dict[str, Tensor]:
        return self.world.questions(self.part)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (B, 8)."""
        chosen = np.random.default_rng([self.seed, step]).integers(len(self.pool["labels"]), size=self.batch_size)
        return {name: tensor[torch.from_numpy(chosen)] for name, tensor in self.pool.items()}
