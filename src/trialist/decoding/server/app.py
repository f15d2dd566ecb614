"""An OpenAI-compatible server around one model, under any generation options.

`transformers serve` has the same routes, but no place for a request's cache, loop or processors, and neither `n` nor
log-probabilities; hence this small application.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from trialist.decoding.prompt_files import Writing
from trialist.decoding.prompts import Prompt, text_prompt, token_prompt
from trialist.decoding.server.answers import Shape, usage_of
from trialist.decoding.server.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    validation_error,
    warning_header,
)
from trialist.decoding.server.worker import Event, Job, Worker
from trialist.decoding.settings import Settings

MOST_BYTES = 8_000_000
"""Of a request"""


class Gate:
    """Refuses requests without the key, and bodies that are too large, before they are read."""

    def __init__(self, app: Any, api_key: str | None) -> None:
        self.app, self.expected = app, None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        too_large = RequestError(f"the request has more than {MOST_BYTES:,} bytes", code="too_large", status=413)
        length = headers.get(b"content-length", b"0")
        refused = None
        if self.expected is not None and scope["path"] != "/health":
            if not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
                refused = RequestError("the API key is missing or wrong", code="invalid_api_key", status=401)
        elif length.isdigit() and int(length) > MOST_BYTES:
            refused = too_large
        if refused:
            await JSONResponse(refused.body(), refused.status)(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise HTTPException(413, str(too_large))
            return message

        await self.app(scope, counted, send)


class Exchange:
    """A request on its way: its jobs in the worker's queue, and what it hears of them."""

    def __init__(self, worker: Worker, prompts: Sequence[Prompt], settings: Settings, top: int | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        n = settings.sampling.num_sequences
        self.choices = n * len(prompts)
        self.jobs = [
            Job(prompt, settings, top, self._tell, worker.limit(prompt, settings), choice=n * at)
            for at, prompt in enumerate(prompts)
        ]
        worker.submit(self.jobs)

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody is left to hear it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancelled.set()

    async def cancel_when_gone(self, request: Request) -> None:
        """Waits for the client to hang up, and ends the work for it then."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    async def next(self) -> Event:
        """Raises the error that ended a job."""
        event = await self._events.get()
        if event.error is not None:
            self.cancel()
            raise event.error
        if event.row is not None and event.row.finish == "cancelled":
            raise RequestError("the server ended this request", code="unavailable", status=503)
        return event


def build_app(
    model: Any, tokenizer: Any, name: str, defaults: Settings, *,
    system: str | None = None, api_key: str | None = None, most_rows: int = 8, most_waiting: int = 64,
) -> FastAPI:  # fmt: skip
    """The application; `app.state.worker` runs the model.

    name: what the model is called in requests. defaults: what holds where a request says nothing. system: instruction before
    conversations that have none. most_rows: rows of a batch; most_waiting: prompts in the queue.
    """
    worker = Worker(model, tokenizer, most_rows, most_waiting)
    own = copy.deepcopy(tokenizer)  # the worker's thread uses the other one at the same time
    writing, encoding, started = Writing(own, system=system), asyncio.Lock(), int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.close)

    app = FastAPI(title="trialist", lifespan=lifespan)
    app.add_middleware(Gate, api_key=api_key)
    app.state.worker = worker

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refuse(request, validation_error(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path}: {error.detail}"
        return await refuse(request, RequestError(path, status=error.status_code, headers=error.headers))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # its traceback is logged by the server below
        message = f"the server failed ({type(error).__name__}: {error})"
        return await refuse(request, RequestError(message, code="internal", status=500))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok"} if worker.alive else {"status": "unavailable"}, 200 if worker.alive else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        lines = [f"trialist_{key}_total {count}" for key, count in worker.counts.items()]
        return PlainTextResponse("\n".join([*lines, f"trialist_waiting {worker.waiting}", ""]))

    entry = {"id": name, "object": "model", "created": started, "owned_by": "trialist"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> Response:
        check_name(model_id)
        return JSONResponse(entry)

    def check_name(asked: str) -> None:
        if asked != name:
            raise RequestError(f"no model {asked!r}; this server has {name!r}", "model", "model_not_found", 404)

    async def answer(request: Request, body: GenerationRequest, said: Sequence[Any]) -> Response:
        """said: conversations, texts or tokens."""
        check_name(body.model)
        settings, ignored = body.settings(defaults)
        headers, top = warning_header(ignored), body.top()
        async with encoding:
            prompts = await run_in_threadpool(lambda: [encode(prompt) for prompt in said])
        shape = Shape(isinstance(body, ChatRequest), name, own, settings, settings.sampling.describe(model))
        exchange = Exchange(worker, prompts, settings, top)
        gone = asyncio.create_task(exchange.cancel_when_gone(request))
        try:
            first = await exchange.next()  # errors of the settings show before anything is sent
        except BaseException:
            exchange.cancel()
            gone.cancel()
            raise
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return StreamingResponse(
                stream(exchange, shape, first, usage, gone), media_type="text/event-stream",
                headers={**headers, "Cache-Control": "no-cache"},
            )  # fmt: skip
        try:
            rows, reports = await collect(exchange, first)
        finally:
            exchange.cancel()
            gone.cancel()
        return JSONResponse(shape.whole(rows, usage_of(exchange.prompt_tokens, rows), reports), headers=headers)

    def encode(said: Any) -> Prompt:
        kind = "messages" if isinstance(said, list) and said and isinstance(said[0], dict) else "prompt"
        try:
            if kind == "messages":
                return writing.prompt(said)
            return text_prompt(own, said) if isinstance(said, str) else token_prompt(own, said)
        except ValueError as error:
            raise RequestError(str(error), kind, "invalid_value") from error

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body, [[message.plain(at) for at, message in enumerate(body.messages)]])

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body, body.prompts())

    return app


async def collect(exchange: Exchange, first: Event) -> tuple[list[Any], list[dict[str, Any]]]:
    """All choices, in order, with what was measured of each."""
    ended: dict[int, Event] = {}
    event = first
    while True:
        if event.kind == "end":
            ended[event.choice] = event
        if len(ended) == exchange.choices:
            ordered = [ended[choice] for choice in range(exchange.choices)]
            return [event.row for event in ordered], [reported(event) for event in ordered]
        event = await exchange.next()


async def stream(
    exchange: Exchange, shape: Shape, event: Event, with_usage: bool, gone: asyncio.Task[None]
) -> AsyncIterator[str]:
    """Server-sent events: roles, text as it comes, ends with their reasons, usage if asked for, `[DONE]`."""

    def line(document: dict[str, Any]) -> str:
        if with_usage:
            document = {"usage": None} | document
        return f"data: {json.dumps(document)}\n\n"

    rows: dict[int, Any] = {}
    try:
        if shape.chat:
            for choice in range(exchange.choices):
                yield line(shape.chunk(choice, role="assistant"))
        while True:
            if event.kind == "text":
                yield line(shape.chunk(event.choice, event.text, event.logprobs))
            elif event.row is not None:
                rows[event.choice] = event.row
                end = shape.chunk(event.choice, finish=event.row.finish)
                yield line(end | {"x_trialist": shape.told([reported(event)])})
            if len(rows) == exchange.choices:
                break
            event = await exchange.next()
        if with_usage:
            yield line(shape.usage_chunk(usage_of(exchange.prompt_tokens, list(rows.values()))))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        exchange.cancel()
        gone.cancel()


def reported(event: Event) -> dict[str, Any]:
    return {**(event.row.report if event.row is not None else {}), **event.report}
