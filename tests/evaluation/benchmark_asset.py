"""A small made-up asset `benchmarks`, laid out like the real one, and a tiny model with a tokenizer to score on it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars

from trialist.data.assets import ASSETS

WORDS = ("ba", "coro", "di", "fulan", "gim", "hesto", "jo", "kilu")


def phrase(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def write_asset(cache: Path) -> Path:
    """Fills `cache` (the value of TRIALIST_CACHE) and returns the asset's folder."""
    disable_progress_bars()
    folder = cache / "assets" / f"benchmarks-{ASSETS['benchmarks'].version}"
    draw = random.Random(0)
    scenes = [
        {
            "ind": at, "activity_label": "Walking", "ctx_a": phrase(draw, 3) + ".", "ctx_b": "he",
            "endings": [phrase(draw, draw.randint(1, 5)) for _ in range(4)], "label": str(draw.randrange(4)),
            "source_id": f"film {at // 2}",
        }
        for at in range(12)
    ]  # fmt: skip
    save(folder, "hellaswag/none/validation", scenes)
    questions = [question(draw, at) for at in range(7)]
    save(folder, "ai2_arc/ARC-Easy/validation", questions)
    requests(folder, "arc_easy/test_rc_5shot", [scored(draw, at) for at in range(9)])
    for subject in ("anatomy", "virology"):
        for part, count in (("dev", 5), ("test", 6), ("validation", 2)):
            rows = [
                {
                    "question": phrase(draw, 4), "subject": subject, "choices": [phrase(draw, 1) for _ in range(4)],
                    "answer": draw.randrange(4),
                }
                for _ in range(count)
            ]  # fmt: skip
            save(folder, f"hails/mmlu_no_train/{subject}/{part}", rows)
    requests(folder, "lambada/bpb_0shot", [{"query": phrase(draw, 6), "choices": [phrase(draw, 1)]} for _ in range(8)])
    sums = [(draw.randrange(9), draw.randrange(9)) for _ in range(5)]
    requests(
        folder,
        "gsm8k/gold_bpb_5shot",
        [{"question": f"{a} and {b}?", "answer": f"Add them.\n#### {a + b}", "choices": [""]} for a, b in sums],
    )
    requests(
        folder,
        "minerva_math_500/gold_bpb_0shot",
        [
            {"problem": f"{a}+{b}", "solution": f"It is $\\boxed{{{a + b}}}$.", "answer": str(a + b), "choices": [""]}
            for a, b in sums
        ],
    )
    return folder


def question(draw: random.Random, at: int) -> dict[str, Any]:
    choices = {"text": [phrase(draw, 2) for _ in range(4)], "label": list("ABCD")}
    return {
        "id": f"v{at}",
        "question": phrase(draw, 4) + "?",
        "choices": choices,
        "answerKey": "ABCD"[draw.randrange(4)],
    }


def scored(draw: random.Random, at: int) -> dict[str, Any]:
    choices = [phrase(draw, draw.randint(1, 4)) for _ in range(3 if at == 2 else 4)]
    query = f"Question: {phrase(draw, 4)}?\nAnswer:"
    return {"id": f"t{at}", "query": query, "choices": choices, "gold": draw.randrange(3)}


def save(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    Dataset.from_list(rows).save_to_disk(str(folder / "hf_datasets" / name))


def requests(folder: Path, name: str, docs: list[dict[str, Any]]) -> None:
    """One row a choice, and every document again behind the id 1,000,000, as the real files have it."""
    file = folder / "oe_eval_tasks" / name / "requests.jsonl.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        for repeated in (0, 1_000_000):
            for at, doc in enumerate(docs):
                for index in range(len(doc["choices"])):
                    lines.write(json.dumps({"doc_id": at + repeated, "doc": doc, "idx": index}) + "\n")


def save_model(folder: Path, *, context: int = 512, seed: int = 0) -> Path:
    """A tiny random Llama with a byte tokenizer, whose weights are large enough to tell sentences apart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trialist.data.tokenizers import byte_tokenizer

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=context, initializer_range=0.3, bos_token_id=256,
        eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
