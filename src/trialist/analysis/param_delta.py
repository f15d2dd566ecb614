"""The analysis `param-delta`: whether a post-training delta may be put on another base, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ParamDeltaAnalysis:
    """Norms and angles of a post-training delta and of the way to a new base, and what speaks against adding it there.

    Reads the three models once and writes none; `trialist apply param-delta` does the sum.
    """

    base_new: str
    """Hub id, local folder or asset of the base that is to get the delta"""
    post: str
    """Post-trained model"""
    base: str
    """Base that it was trained from"""
    on_mismatch: Literal["error", "skip", "by-token", "by-row"] = "error"
    """Where names, shapes or vocabularies differ: stop and list them, leave such tensors out, or match embedding rows by
    token, or by number where tokens were only renamed"""
    output: str | None = None
    """File for everything, tensor by tensor, as JSON"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Returns what to show: likeness of the models, size of the delta, what rounding would erase, and the objections."""
        from trialist.weights.arithmetic import delta_diagnostics
        from trialist.weights.param_delta import progress_bar

        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"--output {self.output} exists; give a new file, so that nothing is overwritten")
        if self.output is not None and not Path(self.output).parent.is_dir():
            raise ValueError(f"--output {self.output}: there is no folder {Path(self.output).parent}; make it first")
        with progress_bar("param-delta") as progress:
            report = delta_diagnostics(
                self.base_new, self.post, self.base, on_mismatch=self.on_mismatch, progress=progress
            )
        for note in (*report.notes, *report.skipped):
            say(f"note: {note}")
        if self.output is not None:
            Path(self.output).write_text(json.dumps(report.record(), indent=2) + "\n", encoding="utf-8")
        shown = {label: value for label, value in report.summary().items() if label != "overridden"}
        return {**shown, "objections": "; ".join(report.overridden) or "none"}
