"""Values as plain JSON: finite numbers only, and laid out so that a diff of two files can be read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def dump_json(value: Any) -> str:
    """Indented JSON in which a list of scalars (or of points) keeps to one line; ends in a newline. Refuses NaN."""

    def flat(entry: Any) -> bool:
        return not isinstance(entry, (dict, list))

    def text(entry: Any, indent: str) -> str:
        inner = indent + "  "
        if isinstance(entry, dict) and entry:
            lines = [
                f"{inner}{json.dumps(key, ensure_ascii=False)}: {text(item, inner)}" for key, item in entry.items()
            ]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        points = isinstance(entry, list) and all(flat(i) or (isinstance(i, list) and all(map(flat, i))) for i in entry)
        if isinstance(entry, list) and entry and not points:
            return "[\n" + ",\n".join(inner + text(item, inner) for item in entry) + f"\n{indent}]"
        return json.dumps(entry, ensure_ascii=False, allow_nan=False)

    return text(value, "") + "\n"


def thin(points: Sequence[Any], most: int) -> list[Any]:
    """At most `most` points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def clean(value: Any) -> Any:
    """The value as plain JSON types: tuples become lists, keys strings, numbers that are not finite null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(entry) for entry in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: clean(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return clean(value.tolist())
    return str(value)
