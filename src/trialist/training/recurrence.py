"""The number of steps of recurrent depth as a function of the training step, in `fit` and in the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from trialist.models.recurrent_depth.steps import depth_of


class RecurrenceCallback(TrainerCallback):
    """All passes of a training step draw the same number of steps, from (seed, step): on every rank, in every micro-batch,
    before and after a resume.

    Without it a model counts its training passes, in a buffer that goes into its checkpoints; then micro-batches differ in
    depth, and a run on two ranks draws others than one on a single process. The seed is `config.recurrent["seed"]`.
    Raises ValueError at the start of training when the model has no recurrent depth.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        depth_of(objects["model"]).by_step = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        depth_of(objects["model"]).passes.fill_(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        depth_of(objects["model"]).by_step = False
