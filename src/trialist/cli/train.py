"""`trialist train NAME`: run a training recipe."""

from __future__ import annotations

from collections.abc import Sequence

from trialist.cli._entries import run_entry
from trialist.training.recipes import RECIPES


def main(arguments: Sequence[str]) -> int:
    return run_entry("train", "recipe", RECIPES, arguments, resumes=True)
