"""Generation options on the command line, by technique: what `generate`, `serve`, `eval` and `search` offer alike.

An entry is `module:Class`, imported when options are parsed: a frozen dataclass whose fields, all of them neutral by default,
become command-line options of the same names. Its module imports heavy libraries within functions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

FLAGS: dict[str, str] = {
    "budget-forcing": "trialist.decoding.budget_forcing.flags:ThinkFlags",
    "compact-cache": "trialist.decoding.compact_cache.flags:CompactCacheFlags",
    "precision": "trialist.decoding.precision.flags:PrecisionFlags",
    "guidance": "trialist.decoding.guidance.flags:GuidanceFlags",
    "progressive-precision": "trialist.decoding.precision.progressive_flags:ProgressivePrecisionFlags",
}


class Flags(Protocol):
    """Command-line options of one technique."""

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        """The generation options that were asked for; none at the neutral setting.

        prompts: one a row of the batch, each a list of messages, or a string for models without a chat template.
        Raises ValueError for values out of range, naming the flag.
        """
