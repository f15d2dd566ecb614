"""`trialist apply NAME`: change a model's weights, or a data set."""

from __future__ import annotations

from collections.abc import Sequence

from trialist.cli._entries import run_entry
from trialist.data.transforms import TRANSFORMS as OF_DATA
from trialist.weights.transforms import TRANSFORMS as OF_WEIGHTS


def main(arguments: Sequence[str]) -> int:
    return run_entry("apply", "transform", {**OF_WEIGHTS, **OF_DATA}, arguments, resumes=False)
