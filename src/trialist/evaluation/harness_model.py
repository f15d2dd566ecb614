"""The model as lm-eval asks it: log-probabilities of continuations, and generated text."""

# B rows, T time, K positions that are scored at the end of the rows, V vocabulary

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trialist.evaluation.harness import check_lengths
from trialist.evaluation.results import Progress, context_length


class HarnessModel(HFLM):
    """lm-eval's own tokenisation and generation; continuations are scored in batches of like length.

    Requests that read the same tokens share a forward pass (the letters of a multiple-choice question are one), and logits
    are computed where a continuation stands, not at every position. Prompts that do not fit are an error, never cut.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int, progress: Progress
    ) -> None:
        self._encode = functools.lru_cache(maxsize=1024)(super().tok_encode)  # choices share their prompt
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=context_length(model))
        self.progress = progress
        self.tokens = 0
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        return self._encode(string, add_special_tokens, left_truncate_len)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._check(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _check(self, requests: Sequence[Any]) -> None:
        context = context_length(self.model)
        if context is not None:
            check_lengths(requests, self.tokenizer, context)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """For each (_, prompt, continuation): the continuation's log-probability in nats, and whether it is the greedy one."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        for at, (_, prompt, continuation) in enumerate(requests):
            sharing.setdefault((*prompt, *continuation[:-1]), []).append(at)
        order = sorted(sharing, key=len, reverse=True)
        self.tokens = sum(map(len, order))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            first = min(len(requests[at][1]) for row in rows for at in sharing[row]) - 1
            logits = self._logits(rows, first)  # (B, K, V)
            normaliser = logits.logsumexp(-1)  # (B, K)
            for at_row, row in enumerate(rows):
                for at in sharing[row]:
                    _, prompt, continuation = requests[at]
                    where = slice(len(prompt) - 1 - first, len(prompt) - 1 - first + len(continuation))
                    wanted = torch.tensor(continuation, device=logits.device)
                    chosen = logits[at_row, where].gather(-1, wanted[:, None])[:, 0] - normaliser[at_row, where]
                    greedy = bool((logits[at_row, where].argmax(-1) == wanted).all())
                    answers[at] = (float(chosen.double().sum()), greedy)
            self.progress(start + len(rows), len(order))
        return answers

    def _logits(self, rows: Sequence[tuple[int, ...]], first: int) -> torch.Tensor:
        """Logits from position `first` on, (B, K, V) in at least float32, of rows padded on the right.

        A causal model does not see what stands to the right, so no mask is needed.
        """
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row)
        keep = {"logits_to_keep": width - first} if self._short else {}
        logits = self.model(input_ids=tokens.to(self.device), use_cache=False, **keep).logits[:, -(width - first) :]
        return logits if logits.dtype == torch.float64 else logits.float()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        self._check(requests)
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at].args[0]))
        texts = [""] * len(requests)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for at, text in zip(chosen, super().generate_until([requests[at] for at in chosen], disable_tqdm=True)):
                texts[at] = text
            self.progress(start + len(chosen), len(order))
        self.tokens = sum(len(self.tok_encode(request.args[0])) for request in requests)
        return texts
