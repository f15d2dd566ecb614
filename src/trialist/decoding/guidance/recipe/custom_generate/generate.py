"""Guided decoding as a recipe for `model.generate(custom_generate=RECIPE, trust_remote_code=True, contexts=[...], ...)`.

Takes the fields of `trialist.decoding.ContrastiveGuidance` beside all arguments of `generate`.
"""

import dataclasses
from typing import Any

from trialist.decoding import ContrastiveGuidance
from trialist.decoding import generate as generate_with

OWN = {field.name for field in dataclasses.fields(ContrastiveGuidance)}


def generate(model: Any, **arguments: Any) -> Any:
    """What `model.generate` returns under contrastive guidance."""
    own = {name: arguments.pop(name) for name in OWN & set(arguments)}
    given = {name: value for name, value in arguments.items() if value is not None}
    return generate_with(model, [ContrastiveGuidance(**own)], given.pop("inputs", None), **given)
