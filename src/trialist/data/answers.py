"""Judging mathematical answers by math-verify, in a process that can be killed.

Computer algebra runs without end on some answers. math-verify's own limits are signals: they work in the main thread of a
process only, and not inside compiled code. So a small process does the judging, one for all items; what takes longer than
the limit ends that process, counts as wrong, and is counted in the notes.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from typing import Any

SECONDS = 10.0
"""Most time for one answer"""
STARTING_SECONDS = 120.0
MEMORY = 4 * 2**30
"""Address space of the judging process, bytes"""
PROGRAM = f"import sys\nfrom {__name__} import serve\nserve(float(sys.argv[1]))\n"


class Judge:
    """A context manager around the judging process, which starts with the first question."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.stopped = 0
        self.failed = 0
        self._process: subprocess.Popen[str] | None = None

    def verify(self, gold: str, answer: str) -> float:
        """1.0 where the answer's last mathematical expression equals that of `gold`, else 0.0."""
        reply = self._ask({"kind": "verify", "gold": gold, "answer": answer})
        return float(reply.get("math_verify", 0.0))

    def minerva(self, doc: dict[str, Any], answer: str) -> dict[str, float]:
        """What lm-eval's Minerva tasks report on an answer: `exact_match` and `math_verify`, 0 or 1."""
        plain = {key: doc[key] for key in ("problem", "solution", "answer")}
        reply = self._ask({"kind": "minerva", "doc": plain, "answer": answer})
        return {name: float(reply.get(name, 0.0)) for name in ("exact_match", "math_verify")}

    def notes(self) -> tuple[str, ...]:
        found = []
        if self.stopped:
            found.append(f"{self.stopped} answers could not be judged within {self.seconds:g} s and count as wrong")
        if self.failed:
            found.append(f"{self.failed} answers ended the judge or broke its rules and count as wrong")
        return tuple(found)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process if self._process is not None else self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            reply = self._read(process, self.seconds)
        except (BrokenPipeError, EOFError):
            self.failed += 1
            self.close()
            return {}
        if reply is None:
            self.stopped += 1
            self.close()
            return {}
        if "error" in reply:
            self.failed += 1
        return reply

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, repr(self.seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            greeting = self._read(self._process, STARTING_SECONDS)
        except EOFError:
            greeting = None
        if greeting is None or "missing" in greeting:
            self.close()
            why = greeting["missing"] if greeting else "its process did not start"
            raise ImportError(f"answers are judged by math-verify, and {why}: pip install 'trialist[eval]'")
        return self._process

    def _read(self, process: subprocess.Popen[str], seconds: float) -> dict[str, Any] | None:
        """The next reply, None after `seconds`. Raises EOFError where the process has ended."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        line = process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def serve(seconds: float) -> None:
    """The judging process: a JSON question a line on stdin, a JSON reply a line on stdout."""
    import faulthandler
    import os
    import resource

    replies = os.fdopen(os.dup(1), "w")  # what a library prints must not pass for a reply
    os.dup2(2, 1)

    def reply(document: dict[str, Any]) -> None:
        replies.write(json.dumps(document) + "\n")
        replies.flush()

    with contextlib.suppress(ValueError):  # a lower limit of the system stays
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        import math_verify
        from lm_eval.tasks.minerva_math import utils as minerva
    except ImportError as error:
        reply({"missing": str(error)})
        return
    reply({"ready": True})
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    for line in sys.stdin:
        # should the asking process die meanwhile, nobody is left to stop this one; the timer needs no Python to run
        faulthandler.dump_traceback_later(2 * seconds + 5, exit=True, file=nowhere)
        question = json.loads(line)
        try:
            if question["kind"] == "minerva":
                found = minerva.process_results(question["doc"], [question["answer"]])
                reply({name: int(found[name]) for name in ("exact_match", "math_verify")})
            else:
                gold, answer = math_verify.parse(question["gold"]), math_verify.parse(question["answer"])
                reply({"math_verify": int(bool(math_verify.verify(gold, answer)))})
        except Exception as error:  # whatever computer algebra raises on an answer is a verdict on that answer
            reply({"error": f"{type(error).__name__}: {error}"})
        faulthandler.cancel_dump_traceback_later()
