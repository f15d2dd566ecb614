"""The command `trialist`: one file per verb. A verb parses, calls and prints; the work is done in the other rooms.

Exit codes: 0 done, 1 failed runs, or no space, memory or free ledger to go on with, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "list": "the trials: claims, and what was measured",
    "show": "one trial: claim, reported numbers, arms, budget, presets, how to use the part alone",
    "plan": "what a trial would take on this machine: runs, minutes, memory, detectable effect",
    "run": "run a trial to its verdict",
    "train": "train your own model by a recipe: supervised fine-tuning",
    "apply": "change a model's weights, or a data set: param-delta, extract-delta, decontaminate",
    "analyze": "what a data set or models tell: contamination, param-delta",
    "runs": "the runs in the ledger, with errors; stages",
    "report": "verdicts, intervals, curves and costs as HTML, Markdown or JSON",
    "evidence": "render EVIDENCE.md and its picture from evidence/",
    "verify": "run a stored run again and compare",
    "generate": "text of a model under any decoding techniques: streamed, or a file of prompts",
    "serve": "an OpenAI-compatible server on this machine, with the same options",
    "eval": "score a model on benchmarks: bits per byte, BLiMP, HellaSwag, GSM8K, ...",
    "compare": "a paired verdict on two evaluations, or on two result files that you already have",
    "export": "copy the model of a run to a folder",
    "assets": "real models and data that come from package registries",
}

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from trialist import __version__

        print(__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        for argument in arguments:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise ValueError(f"the argument {argument!a} is not valid UTF-8; rename what it names")
        if verb not in VERBS:
            from trialist.engine.registry import unknown

            raise ValueError(unknown("command", verb, VERBS, "`trialist --help` lists them"))
        return importlib.import_module(f"trialist.cli.{verb}").main(rest)
    except KeyboardInterrupt:
        print("interrupted; finished runs are in the ledger, the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        return 0
    except (ValueError, OSError, ImportError) as error:
        complain(str(error))
        return 1 if getattr(error, "errno", None) in OUT_OF_SPACE else 2
    except MemoryError as error:
        complain(f"out of memory: {str(error) or 'a smaller input may fit'}")
        return 1
    except RuntimeError as error:
        code = getattr(
            error, "exit_code", None
        )  # a LedgerError, whose module needs sqlalchemy, which stays unloaded here
        if code is None:
            raise
        complain(str(error))
        return code


def complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))


def overview() -> str:
    lines = [
        "usage: trialist COMMAND ...",
        "",
        "Controlled trials of language-model techniques, with an honest verdict.",
        "",
    ]
    lines += [f"  {verb:<10} {about}" for verb, about in VERBS.items()]
    lines += [
        "",
        "  trialist list                                          what there is",
        "  trialist run selective-attention --preset demo         a verdict in minutes",
        "  trialist COMMAND --help                                options, units, defaults",
    ]
    return "\n".join(lines)
