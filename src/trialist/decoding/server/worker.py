"""One thread that runs the model: a bounded queue of jobs, those of equal settings in one left-padded batch."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trialist.decoding.prompts import Prompt, token_limit
from trialist.decoding.running import Continuation, TokenLogprob, run
from trialist.decoding.server.requests import RequestError, sampled_alike
from trialist.decoding.settings import Settings

log = logging.getLogger("trialist.serve")
ENDED = RequestError("the server is shutting down", code="unavailable", status=503)
"""For whoever still waits then; those that were cancelled do not"""


@dataclass(frozen=True)
class Event:
    """Something about one choice of a job: text, its end, or an error that ends the whole job."""

    kind: Literal["text", "end", "error"]
    choice: int = 0
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    row: Continuation | None = None
    report: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A prompt that somebody waits for. `tell` is called from the thread of the model; `choice` is the number of its first."""

    prompt: Prompt
    settings: Settings
    top_logprobs: int | None
    tell: Callable[[Event], None]
    limit: int
    choice: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    """Whether text was told already"""


class Worker:
    """Runs jobs in the order in which they came; those behind the first that have its settings go along, up to `most_rows` rows.

    A batch runs to its end before the next one starts. Requests that draw from a seed of their own run alone, so that nobody
    else's rows change what they draw.
    """

    def __init__(self, model: Any, tokenizer: Any, most_rows: int, most_waiting: int) -> None:
        self.model, self.tokenizer, self.most_rows, self.most_waiting = model, tokenizer, most_rows, most_waiting
        self.counts = {"requests": 0, "refused": 0, "prompt_tokens": 0, "tokens": 0}
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="trialist-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def limit(self, prompt: Prompt, settings: Settings) -> int:
        """Tokens that a continuation may have. Raises RequestError where the context is too short."""
        try:
            return token_limit(self.model, prompt, settings.sampling.max_new_tokens)
        except ValueError as error:
            raise RequestError(
                str(error), "prompt" if prompt.continues else "messages", "context_length_exceeded"
            ) from error

    def submit(self, jobs: Sequence[Job]) -> None:
        """All jobs of a request, or none. Raises RequestError: 429 where the queue is full, 503 where it is closed."""
        with self._changed:
            if not self.alive:
                raise ENDED
            for job in [job for job in self._waiting if job.cancelled.is_set()]:
                self._waiting.remove(job)  # nobody waits for it, so it takes nobody's place
                job.tell(Event("error", error=ENDED))
            if len(jobs) > self.most_waiting:
                raise RequestError(f"{len(jobs)} prompts in a request; at most {self.most_waiting} can wait", "prompt")
            if len(self._waiting) + len(jobs) > self.most_waiting:
                self.counts["refused"] += 1
                raise RequestError(
                    f"{len(self._waiting)} prompts are waiting and the queue takes {self.most_waiting}; try again later",
                    code="queue_full", status=429, headers={"Retry-After": "1"},
                )  # fmt: skip
            self.counts["requests"] += 1
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self, seconds: float = 30.0) -> None:
        """Ends what runs at its next token and answers what waits."""
        with self._changed:
            self._closing = True
            for job in (*self._running, *self._waiting):
                job.cancelled.set()
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                batch = self._running = self._next_batch()
            try:
                self._run(batch)
            except Exception as error:  # whatever it is, the others want their answers
                if len(batch) > 1 and not any(job.begun for job in batch):
                    for job in batch:  # one of them may have spoilt it for all
                        self._run_alone(job)
                else:
                    self._fail(batch, error)

    def _run_alone(self, job: Job) -> None:
        try:
            self._run([job])
        except Exception as error:
            self._fail([job], error)

    def _next_batch(self) -> list[Job]:
        first = self._waiting.popleft()
        sampling = first.settings.sampling
        batch, room = [first], self.most_rows - sampling.num_sequences
        if sampling.samples(self.model) and sampling.seed is not None:
            return batch
        for job in list(self._waiting):
            if room < sampling.num_sequences:
                break
            if sampled_alike(job.settings, first.settings):
                self._waiting.remove(job)
                batch.append(job)
                room -= sampling.num_sequences
        return batch

    def _run(self, batch: Sequence[Job]) -> None:
        for job in batch:
            if job.cancelled.is_set():
                job.tell(Event("error", error=ENDED))
        batch = [job for job in batch if not job.cancelled.is_set()]
        if not batch:
            return
        settings, n = batch[0].settings, batch[0].settings.sampling.num_sequences
        tops = [job.top_logprobs for job in batch if job.top_logprobs is not None]

        def tell(at: int, text: str, logprobs: list[TokenLogprob]) -> None:
            job = batch[at // n]
            job.begun = True
            kept = [] if job.top_logprobs is None else [shortened(entry, job.top_logprobs) for entry in logprobs]
            job.tell(Event("text", job.choice + at % n, text, kept))

        result = run(
            self.model, self.tokenizer, settings, [job.prompt for job in batch], limits=[job.limit for job in batch],
            stops=[job.settings.sampling.stop for job in batch], top_logprobs=max(tops, default=None), tell=tell,
            given_up=lambda at: batch[at // n].cancelled.is_set(),
        )  # fmt: skip
        self.counts["prompt_tokens"] += sum(len(job.prompt.token_ids) for job in batch)
        self.counts["tokens"] += result.tokens
        report = {**result.report, "seed": result.seed, "rows_in_batch": len(result.rows)}
        for at, row in enumerate(result.rows):
            job = batch[at // n]
            job.tell(Event("end", job.choice + at % n, row=row, report=report))

    def _fail(self, batch: Sequence[Job], error: Exception) -> None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            answer = RequestError("out of memory; ask for less, or shorter", code="out_of_memory", status=503)
        elif isinstance(error, ValueError):
            answer = RequestError(str(error), code="invalid_value")
        else:
            log.error("a request failed", exc_info=error)
            answer = RequestError(f"generation failed ({type(error).__name__}: {error})", code="internal", status=500)
        for job in batch:
            job.tell(Event("error", error=answer))


def shortened(entry: TokenLogprob, top: int) -> TokenLogprob:
    """With the `top` most likely tokens: others of the batch may have asked for more."""
    return dataclasses.replace(entry, top=entry.top[:top])
