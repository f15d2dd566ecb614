"""Budget forcing within one call of `generate` against a loop of calls, each of which reads everything again, for equal tokens;
and what following the rows costs beside plain generation of as many tokens."""

from __future__ import annotations

import functools

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from benchmarks.timer import Limit, Row, compare, threads
from trialist.decoding import BudgetForcing, generate

SIZES = {
    "vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "eos_token_id": None,
}  # fmt: skip
END, WAIT, ANSWER = 7, 11, 13
"""Tokens of the delimiter, of the string in place of an end, and of what is written behind a forced end"""
PROMPT, ROUND, IGNORES, LAST, BATCH = 512, 48, 2, 16, 2
REPEATS = 20


class Proposing(LogitsProcessor):
    """Makes the end of thinking the most probable token at certain lengths, as a model would that closes its trace there."""

    def __init__(self, lengths: set[int]) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scores = scores.clone()
        scores[:, END] = 1e4 if input_ids.shape[1] in self.lengths else -1e4
        return scores


def rows() -> list[Row]:
    with threads(1), torch.no_grad():
        return _rows()


def _rows() -> list[Row]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = torch.randint(20, SIZES["vocab_size"], (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    # a round of thought, then the string; the last round ends in the delimiter
    ends = {PROMPT + number * (ROUND + 1) + ROUND for number in range(IGNORES + 1)}
    proposing = LogitsProcessorList([Proposing(ends)])
    new = (IGNORES + 1) * (ROUND + 1) + LAST
    forced = functools.partial(_forced, model, ids, proposing, new)
    called = functools.partial(_called, model, ids, proposing)
    if not torch.equal(forced(), called()):
        raise RuntimeError("the loop of calls and the forcing within one call wrote different tokens")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    limit = Limit(flops=2 * parameters * BATCH * (PROMPT + new), bytes=4 * parameters * (new + 1))
    work = (
        f"{IGNORES} ends put off, rounds of {ROUND} tokens, {LAST} of answer, behind {PROMPT}, B={BATCH}, 6 layers of width 576, "
        "float32, 1 thread"
    )
    names = "budget forcing in one call", f"{IGNORES + 2} calls of generate"
    loop = compare(dict(zip(names, (forced, called))), work=work, repeats=REPEATS, limit=limit)
    plain = functools.partial(_plain, model, ids, proposing, new)
    beside = compare(
        {"budget forcing": forced, "plain generate": plain}, work=f"{new} tokens behind {PROMPT}", repeats=REPEATS
    )
    return [loop.row(*names, at_most=1 / 1.3), beside.row("budget forcing", "plain generate", at_most=1.1)]


def _forced(model: LlamaForCausalLM, ids: torch.Tensor, proposing: LogitsProcessorList, new: int) -> torch.Tensor:
    option = BudgetForcing(
        _tokenizer(),
        end_think=f"<{END}>",
        start_think=None,
        num_ignore=IGNORES,
        ignore_text=f"<{WAIT}>",
        final_prefix="",
    )
    return generate(
        model, [option], ids, do_sample=False, max_new_tokens=new, logits_processor=proposing, pad_token_id=0
    )


def _plain(model: LlamaForCausalLM, ids: torch.Tensor, proposing: LogitsProcessorList, new: int) -> torch.Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=new, logits_processor=proposing, pad_token_id=0)


def _called(model: LlamaForCausalLM, ids: torch.Tensor, proposing: LogitsProcessorList) -> torch.Tensor:
    """What users of a model without forcing do: generate up to the end, take the end away, write the string, call again."""
    options = {"do_sample": False, "logits_processor": proposing, "pad_token_id": 0}
    wait, end = (torch.full((len(ids), 1), token) for token in (WAIT, END))
    for number in range(IGNORES + 1):
        ids = model.generate(ids, max_new_tokens=ROUND + 1, eos_token_id=END, **options)[:, :-1]
        ids = torch.cat([ids, wait if number < IGNORES else end], dim=1)
    return model.generate(ids, max_new_tokens=LAST, **options)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Tokens `<0>`, `<1>`, ..., all of them whole."""
    vocabulary = {f"<{token}>": token for token in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", unk_token="<0>")
    fast.add_tokens([f"<{END}>"], special_tokens=True)
    return fast
