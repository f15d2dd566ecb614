"""`trialist analyze NAME`: what a data set, a training run or a representation tells."""

from __future__ import annotations

from collections.abc import Sequence

from trialist.analysis.registry import ANALYSES
from trialist.cli._entries import run_entry


def main(arguments: Sequence[str]) -> int:
    return run_entry("analyze", "analysis", ANALYSES, arguments, resumes=False)
