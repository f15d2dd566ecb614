"""Benchmarks by name: where their items come from, and which fields are their questions.

What the table says of Hub data sets is the list of evaluations of open-instruct (arXiv 2411.15124, and its later additions),
question fields only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where the items of a benchmark come from."""

    asset: str
    """Name of rows in the asset `benchmarks`, or a pattern with one `*` for several; empty for a Hub data set"""
    fields: tuple[str, ...]
    hub: str = ""
    """Hub id, with `:configuration` or, for all of them, `:*`"""
    split: str = "test"
    limit: int | None = None
    """Most items of each configuration"""
    pattern: str = ""
    """What cuts the one column of the asset into the fields, by name"""
    all_items: str = ""
    """Where the asset holds a sample: how `--benchmarks` names the whole"""


SOURCES: dict[str, Source] = {
    "gsm8k": Source("gsm8k/gold_bpb_5shot", ("question",)),
    "math": Source("minerva_math_*/gold_bpb_0shot", ("problem",)),
    "math500": Source("minerva_math_500/gold_bpb_0shot", ("problem",)),
    "mmlu": Source("hails/mmlu_no_train/*/test", ("question",)),
    "humaneval": Source("codex_humaneval/gold_bpb_0shot", ("prompt",)),
    "mbpp": Source("codex_mbpp/gold_bpb_0shot", ("text",)),
    "drop": Source("drop/bpb_5shot", ("passage", "question"), all_items="ucinlp/drop::passage,question"),
    "hellaswag": Source("hellaswag/none/validation", ("ctx",)),
    "arc_easy": Source("arc_easy/test_rc_5shot", ("query",)),
    "arc_challenge": Source("arc_challenge/test_rc_5shot", ("query",)),
    "boolq": Source("boolq/none/validation", ("passage", "question")),
    "piqa": Source("piqa/plain_text/validation", ("goal",)),
    "winogrande": Source("winogrande/winogrande_xl/validation", ("sentence",)),
    "openbookqa": Source("openbookqa/test_rc_5shot", ("query",)),
    "sciq": Source("sciq/none/validation", ("question",)),
    "commonsense_qa": Source("tau/commonsense_qa/none/validation", ("question",)),
    "social_iqa": Source("social_i_qa/none/validation", ("context", "question")),
    "copa": Source("super_glue/copa/validation", ("premise",)),
    "lambada": Source("lambada/bpb_0shot", ("query",)),
    "triviaqa": Source("trivia_qa/rc.wikipedia.nocontext/validation", ("question",)),
    "nq_open": Source("nq_open/none/validation", ("question",)),
    "medmcqa": Source("medmcqa/rc_5shot", ("question",)),
    "medqa": Source("medqa_en/rc_5shot", ("question",)),
    "jeopardy": Source("jeopardy/bpb_5shot", ("query",)),
    "squad": Source(
        "squad/bpb_5shot",
        ("query",),
        pattern=r"Title: [^\n]*\nBackground: (?P<passage>.*)\nQuestion: (?P<question>.*)\nAnswer:",
        all_items="rajpurkar/squad::context,question",
    ),
    "coqa": Source("coqa/bpb_0shot", ("story", "question")),
    "popqa": Source("", ("subj", "prop", "obj"), "akariasai/PopQA"),
    "ifeval": Source("", ("prompt",), "google/IFEval", "train"),
    "alpaca_eval": Source("", ("instruction",), "tatsu-lab/alpaca_eval", "eval"),
    "bbh": Source("", ("input",), "lukaemon/bbh:*"),
    "truthfulqa": Source("", ("question",), "truthfulqa/truthful_qa:generation", "validation"),
    "mmlu_pro": Source("", ("question",), "TIGER-Lab/MMLU-Pro"),
    "gpqa": Source("", ("Question",), "Idavidrein/gpqa:gpqa_extended", "train"),
    "agi_eval": Source("", ("passage", "question"), "lighteval/agi_eval_en:*", "train"),
    "bigcodebench": Source("", ("instruct_prompt",), "bigcode/bigcodebench", "v0.1.2"),
    "deepmind_math": Source("", ("question",), "deepmind/math_dataset:*", limit=50),
    "aime_2024": Source("", ("problem",), "HuggingFaceH4/aime_2024", "train"),
    "aime_2025": Source("", ("problem",), "yentinglin/aime_2025", "train"),
    "simpleqa": Source("", ("problem",), "basicv8vc/SimpleQA"),
    "toxigen": Source("", ("prompt",), "hamishivi/toxigen-prompts", "train"),
    "xstest": Source("", ("prompt",), "walledai/XSTest"),
    "wildguard": Source("", ("prompt",), "allenai/wildguardmix:wildguardtest"),
    "harmbench": Source("", ("Behavior",), "allenai/tulu-3-harmbench-eval"),
    "do_anything_now": Source("", ("prompt",), "allenai/tulu-3-do-anything-now-eval"),
}
