"""Command-line options of progressive precision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProgressivePrecisionFlags:
    """The bits of nested weights fall while a text is written."""

    bits_schedule: str = ""
    """Bits from which step on, as 4@0,3@85,2@170, or a folder that `trialist train precision-schedule` wrote; step 0 follows the
    first token"""
    prefill_bits: int = 0
    """Bits at which the prompt is read, under a schedule; 0 takes the highest of the schedule"""

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        """As `Flags` says."""
        if not self.bits_schedule:
            if self.prefill_bits:
                raise ValueError(f"--prefill-bits {self.prefill_bits} needs --bits-schedule, such as 3@0,2@85")
            return ()
        from trialist.decoding.precision.progressive import ProgressivePrecision, check_precisions
        from trialist.decoding.precision.schedules import load_schedule, parse_schedule
        from trialist.models.nested.precision import precision_dials

        try:
            precision_dials(model)  # says how to make a nested model, before anything else
            if os.path.isdir(os.path.expanduser(self.bits_schedule)):
                schedule = load_schedule(self.bits_schedule)
            elif "@" in self.bits_schedule:
                schedule = parse_schedule(self.bits_schedule)
            else:
                raise ValueError("it is no folder, and a schedule in words is BITS@STEP, as in 4@0,3@85,2@170")
            known = getattr(schedule, "prefill_bits", None)
            option = ProgressivePrecision(schedule, self.prefill_bits or known)
            check_precisions(model, option.precisions)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"--bits-schedule {self.bits_schedule}: {error}") from error
        return (option,)
