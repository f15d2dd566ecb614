"""Budget forcing as a recipe for `model.generate(custom_generate=RECIPE, trust_remote_code=True, tokenizer=tokenizer, ...)`.

Takes the fields of `trialist.decoding.BudgetForcing` beside all arguments of `generate`.
"""

import dataclasses
import inspect
from typing import Any

from transformers import GenerationMixin

from trialist.decoding import BudgetForcing
from trialist.decoding import generate as generate_with

OWN = {field.name for field in dataclasses.fields(BudgetForcing)} - {"tokenizer"}
NAMED = set(inspect.signature(GenerationMixin.generate).parameters)
"""Arguments that `generate` hands on also where they were not given; among the others None is a value"""


def generate(model: Any, tokenizer: Any = None, **arguments: Any) -> Any:
    """What `model.generate` returns under budget forcing. Raises ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("budget forcing needs the model's tokenizer: generate(..., tokenizer=tokenizer)")
    own = {name: arguments.pop(name) for name in OWN & set(arguments)}
    given = {name: value for name, value in arguments.items() if value is not None or name not in NAMED}
    option = BudgetForcing(tokenizer, **own)
    return generate_with(model, [option], given.pop("inputs", None), tokenizer=tokenizer, **given)
