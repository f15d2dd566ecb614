"""`trialist serve --model M`: an OpenAI-compatible server on this machine, under any generation options."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.cli._generation import load, parse_generation, require_model
from trialist.decoding.settings import Settings

GRACE_SECONDS = 10
"""That answers under way have when the server is ended"""
KEY = "TRIALIST_API_KEY"


@dataclass(frozen=True)
class Options:
    """Serve a model that you have to any OpenAI client, under any decoding techniques: /v1/chat/completions, /v1/completions,
    /v1/models, /health, /metrics. Options of sampling and techniques are defaults of requests, which may say otherwise by the
    same names."""

    model: str | None = None
    """Hub id, local folder or asset of a causal language model"""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network"""
    port: int = 8000
    """Port to listen on; 0 takes a free one"""
    api_key: str | None = None
    """Key that requests must bring; also from the environment, TRIALIST_API_KEY, where other users do not see it"""
    batch: int = 8
    """Waiting prompts of equal settings that are generated together; 1 answers one by one"""
    queue: int = 64
    """Prompts that may wait; further requests are refused with 429"""
    system: str | None = None
    """Instruction before conversations that have none"""
    dtype: str = "float32"
    """float32, bfloat16, float16, float64, or auto: the saved one"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def main(arguments: Sequence[str]) -> int:
    options, settings = parse_generation(Options, "serve", arguments)
    source = require_model(options.model, "serve")
    for option in ("batch", "queue"):
        if getattr(options, option) < 1:
            raise ValueError(f"--{option} must be at least 1, not {getattr(options, option)}")
    key = options.api_key if options.api_key is not None else os.environ.get(KEY)
    if key is not None and (not key or not key.isascii() or key.strip() != key):
        raise ValueError(f"--api-key (or {KEY}) must be plain text without blanks around it; leave it out for no key")
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f"the server needs `pip install 'trialist[serve]'` ({error})") from error
    with bound(options.host, options.port) as listener:
        model, tokenizer = load(source, options.dtype, options.device)
        try_out(model, tokenizer, settings, options.system)
        from trialist.decoding.server.app import build_app

        app = build_app(
            model, tokenizer, model_name(source), settings, system=options.system, api_key=key,
            most_rows=options.batch, most_waiting=options.queue,
        )  # fmt: skip
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS, lifespan="on"
        )
        server = uvicorn.Server(config)
        listener.listen(config.backlog)  # so that whoever reads the line below gets through
        place = listener.getsockname()
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        say(f"{model_name(source)} on http://{host}:{place[1]}/v1 ({settings.sampling.describe(model)}); Ctrl-C ends")
        if key is None and not loopback(place[0]):
            say("warning: without --api-key everybody who reaches this address can use the model")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again when all is done
            say("ended")
    return 0


def try_out(model: Any, tokenizer: Any, settings: Settings, system: str | None) -> None:
    """One token under the settings, so that those that do not fit the model are told before a client meets them."""
    from trialist.decoding.prompt_files import Writing
    from trialist.decoding.running import run

    prompt = Writing(tokenizer, system=system).prompt("Hello")
    run(model, tokenizer, settings, [prompt], given_up=lambda row: True)


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises ValueError where that cannot be had, before a model is loaded."""
    if not 0 <= port < 65536:
        raise ValueError(f"--port must be 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is no address of this machine ({error}); 127.0.0.1 is") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} on {host} is in use; give another --port (0 takes a free one)") from error
        raise ValueError(f"--host {host} --port {port} cannot be used: {error.strerror}") from error
    return listener


def loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def model_name(model: str) -> str:
    """What clients call it: the name of a folder, else what it is called here."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
