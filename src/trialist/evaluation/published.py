"""The benchmarks with local data: which published lm-eval task each one is, and where its rows come from.

Prompts, few-shot format, targets and metrics are those of the task file that lm-eval publishes; only the data come from
the asset `benchmarks`. The asset lacks the training splits, so few-shot examples come from the split named in `shots_from`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Published:
    """A published lm-eval task on local data."""

    file: str
    """Task file within lm-eval's folder of tasks"""
    rows: Callable[[], Mapping[str, Rows]]
    """Split -> rows, with the columns that the task file reads"""
    split: str
    """The split that is scored"""
    metrics: tuple[str, ...]
    """Metrics per item, the deciding one first"""
    about: str
    shots: int = 0
    """Few-shot examples of the published setting"""
    shots_from: str = "the scored split, never the scored item itself"
    cluster: str | None = None
    """Column whose equal values mark items of one document"""
    judged: bool = False
    """Whether generated answers are judged by math-verify"""


def stored(name: str) -> Rows:
    from trialist.data.benchmarks import open_benchmark

    return open_benchmark(name)


def documents(name: str) -> Rows:
    from trialist.data import benchmarks

    return benchmarks.documents(name)


def _arc(name: str, configuration: str) -> Mapping[str, Rows]:
    rows = []
    for doc in documents(f"{name}/test_rc_5shot"):
        letters = [chr(ord("A") + at) for at in range(len(doc["choices"]))]
        rows.append(
            {
                "id": doc["id"],
                "question": _between(doc["query"], "Question: ", "\nAnswer:"),
                "choices": {"text": doc["choices"], "label": letters},
                "answerKey": letters[doc["gold"]],
            }
        )
    return {"test": rows, "validation": stored(f"ai2_arc/{configuration}/validation")}


def _openbookqa() -> Mapping[str, Rows]:
    rows = [
        {
            "id": doc["id"],
            "question_stem": _between(doc["query"], "Question: ", "\nAnswer:"),
            "choices": {"text": doc["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[doc["gold"]],
        }
        for doc in documents("openbookqa/test_rc_5shot")
    ]
    return {"test": rows, "validation": stored("openbookqa/main/validation")}


def _boolq() -> Mapping[str, Rows]:
    rows = []
    for doc in documents("boolq/rc_0shot"):
        passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        label = int(doc["choices"][doc["gold"]] == "yes")
        rows.append({"passage": passage, "question": question, "idx": doc["idx"], "label": label})
    return {"validation": rows}


def _lambada() -> Mapping[str, Rows]:
    return {"test": [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in documents("lambada/bpb_0shot")]}


def _gsm8k() -> Mapping[str, Rows]:
    return {"test": [{key: doc[key] for key in ("question", "answer")} for doc in documents("gsm8k/gold_bpb_5shot")]}


def _math500() -> Mapping[str, Rows]:
    rows = documents("minerva_math_500/gold_bpb_0shot")
    return {"test": [{key: str(doc[key]) for key in ("problem", "solution", "answer")} for doc in rows]}


def _validation(name: str) -> Callable[[], Mapping[str, Rows]]:
    return lambda: {"validation": stored(f"{name}/validation")}


def mmlu_subjects() -> list[str]:
    from trialist.data.benchmarks import benchmark_names

    prefix = "hails/mmlu_no_train/"
    return sorted(
        name.split("/")[2] for name in benchmark_names() if name.startswith(prefix) and name.endswith("/test")
    )


def mmlu_subject(subject: str) -> Published:
    def rows() -> Mapping[str, Rows]:
        return {part: stored(f"hails/mmlu_no_train/{subject}/{part}") for part in ("test", "dev")}

    return Published(
        f"mmlu/default/mmlu_{subject}.yaml", rows, "test", ("acc",), f"MMLU, {subject.replace('_', ' ')}",
        shots_from="the development split, in its order",
    )  # fmt: skip


def published(name: str) -> dict[str, Published]:
    """Task name -> task: one, or the 57 subjects of `mmlu`. Raises ValueError for a subject that does not exist."""
    if name == "mmlu":
        return {f"mmlu_{subject}": mmlu_subject(subject) for subject in mmlu_subjects()}
    if name in PUBLISHED:
        return {name: PUBLISHED[name]}
    subject = name.removeprefix("mmlu_")
    if subject not in (known := mmlu_subjects()):
        raise ValueError(f"no MMLU subject {subject!r}; there is {', '.join(known)}")
    return {name: mmlu_subject(subject)}


def _between(text: str, before: str, after: str) -> str:
    return text.removeprefix(before).removesuffix(after)


NORMED = ("acc_norm", "acc")
PUBLISHED = {
    "hellaswag": Published(
        "hellaswag/hellaswag.yaml", _validation("hellaswag/none"), "validation", NORMED,
        "HellaSwag, validation: 10,042 continuations of everyday scenes", cluster="source_id",
    ),
    "arc_easy": Published(
        "arc/arc_easy.yaml", lambda: _arc("arc_easy", "ARC-Easy"), "test", NORMED,
        "ARC-Easy, test: 2,376 science questions", shots_from="the validation split",
    ),
    "arc_challenge": Published(
        "arc/arc_challenge.yaml", lambda: _arc("arc_challenge", "ARC-Challenge"), "test", NORMED,
        "ARC-Challenge, test: 1,172 hard science questions", shots_from="the validation split",
    ),
    "mmlu": Published(
        "mmlu/default/_mmlu.yaml", dict, "test", ("acc",),
        "MMLU, test: 14,042 questions of 57 subjects (mmlu_SUBJECT for one)",
        shots_from="the development split, in its order",
    ),
    "lambada": Published(
        "lambada/lambada_openai.yaml", _lambada, "test", ("acc", "log_likelihood"),
        "LAMBADA, test as OpenAI prepared it: 5,153 last words",
    ),
    "piqa": Published(
        "piqa/piqa.yaml", _validation("piqa/plain_text"), "validation", NORMED, "PIQA, validation: 1,838 physical goals"
    ),
    "boolq": Published(
        "super_glue/boolq/default.yaml", _boolq, "validation", ("acc",),
        "BoolQ, validation: 3,270 yes/no questions on passages", cluster="passage",
    ),
    "winogrande": Published(
        "winogrande/default.yaml", _validation("winogrande/winogrande_xl"), "validation", ("acc",),
        "WinoGrande, validation: 1,267 pronouns",
    ),
    "openbookqa": Published(
        "openbookqa/openbookqa.yaml", _openbookqa, "test", NORMED, "OpenBookQA, test: 500 science questions",
        shots_from="the validation split",
    ),
    "sciq": Published(
        "sciq/sciq.yaml", _validation("sciq/none"), "validation", NORMED,
        "SciQ, validation (published: test): 1,000 science questions", cluster="support",
    ),
    "commonsense_qa": Published(
        "commonsense_qa/default.yaml", _validation("tau/commonsense_qa/none"), "validation", ("acc",),
        "CommonsenseQA, validation: 1,221 questions",
    ),
    "social_iqa": Published(
        "siqa/siqa.yaml", _validation("social_i_qa/none"), "validation", ("acc",),
        "Social IQa, validation: 1,954 questions", cluster="context",
    ),
    "copa": Published(
        "super_glue/copa/default.yaml", _validation("super_glue/copa"), "validation", ("acc",),
        "COPA, validation: 100 causes and effects",
    ),
    "gsm8k": Published(
        "gsm8k/gsm8k-cot.yaml", _gsm8k, "test",
        ("math_verify", "exact_match,strict-match", "exact_match,flexible-extract"),
        "GSM8K, test, as lm-eval's gsm8k_cot: 1,319 worded problems, answers also judged by math-verify",
        shots=8, shots_from="the eight worked examples of the task file", judged=True,
    ),
    "math500": Published(
        "minerva_math/minerva_math500.yaml", _math500, "test", ("math_verify", "exact_match"),
        "MATH-500, as lm-eval's minerva_math500: competition problems judged by math-verify",
        shots=4, shots_from="the four worked examples of the task file", judged=True,
    ),
}  # fmt: skip
