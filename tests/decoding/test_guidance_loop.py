"""Guided generation of tiny models, held against loops from scratch and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from trialist.decoding import ContrastiveGuidance, generate

from ..models.conftest import GREEDY, VOCABULARY
from .guided import CONTEXTS, NEW, OTHER, PLAIN, built, log_p, naive, new_tokens, padded


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: built(family) for family in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def llama(models) -> Any:
    return models["llama"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_token_mode_is_the_guidance_of_transformers(models, family, beta):
    model = models[family]
    more = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    for plain, context in zip(PLAIN, CONTEXTS):
        theirs = model.generate(
            torch.tensor([context]), guidance_scale=1 + 1 / beta, negative_prompt_ids=torch.tensor([plain]), **more
        )
        option = ContrastiveGuidance.opad([[context]], beta, "token")
        ours = generate(model, [option], torch.tensor([plain]), **more)
        assert ours.sequences[0, len(plain) :].tolist() == theirs.sequences[0, len(context) :].tolist()
        assert torch.allclose(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("reward", "window", "first"), [("token", 1, True), ("two_step", 2, True), ("two_step", 3, False)]
)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_a_padded_batch_is_the_naive_loop_row_by_row(models, family, reward, window, first, cache):
    model = models[family]
    option = ContrastiveGuidance([CONTEXTS], 0.8, reward=reward, window=window, first_token=first)
    found = new_tokens(model, option, PLAIN, use_cache=cache)
    wanted = [naive(model, plain, context, 0.8, window, first) for plain, context in zip(PLAIN, CONTEXTS)]
    assert found == wanted


def test_transformers_shifts_padded_negative_prompts_of_learned_positions_and_this_does_not(models):
    model = models["gpt2"]
    width = max(map(len, PLAIN))
    negative = padded([PLAIN[0], [1] * (width + 3)])
    row = {name: tensor[:1] for name, tensor in negative.items()}
    theirs = model.generate(
        torch.tensor(CONTEXTS[:1]), guidance_scale=2.0, negative_prompt_ids=row["input_ids"],
        negative_prompt_attention_mask=row["attention_mask"], return_dict_in_generate=True, output_scores=True, **GREEDY,
    )  # fmt: skip
    ours = generate(
        model, [ContrastiveGuidance([CONTEXTS[:1]])], **row, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    alone = log_p(model, CONTEXTS[0])[-1] * 2 - log_p(model, PLAIN[0])[-1]
    assert torch.allclose(ours.scores[0][0].double(), alone, atol=1e-4)
    assert (theirs.scores[0][0].double() - alone).abs().max() > 0.1


class FromScratch(LogitsProcessor):
    """Classifier-free guidance of one prompt that reads the negative prompt anew at every step."""

    def __init__(self, model: Any, scale: float, negative: list[int], prompt: int) -> None:
        self.model, self.scale, self.negative, self.prompt = model, scale, negative, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [log_p(self.model, self.negative + row[self.prompt :].tolist())[-1] for row in input_ids]
        l_0 = torch.stack(rows).float()
        return self.scale * (scores.log_softmax(-1) - l_0) + l_0


def test_transformers_loses_track_of_beams_and_of_a_second_prompt_and_this_does_not(llama):
    same = []
    for plain, context in zip(PLAIN, CONTEXTS):
        ids, beams = torch.tensor([context]), {**GREEDY, "num_beams": 4}
        theirs = llama.generate(ids, guidance_scale=3.0, negative_prompt_ids=torch.tensor([plain] * 4), **beams)
        right = [FromScratch(llama, 3.0, plain, len(context))]
        same.append(torch.equal(theirs, llama.generate(ids, logits_processor=right, **beams)))
    assert not all(same)

    plain, context = PLAIN[0], CONTEXTS[0]
    once = [UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, llama, torch.tensor([plain]))]
    first = llama.generate(torch.tensor([context]), logits_processor=once, **GREEDY)
    assert not torch.equal(llama.generate(torch.tensor([context]), logits_processor=once, **GREEDY), first)
    assert new_tokens(llama, ContrastiveGuidance([[context]]), [plain])[0] == first[0, len(context) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reward", ["token", "two_step"])
def test_beams_find_the_sequences_that_exhaustive_rescoring_finds(models, family, reward):
    model, steps = models[family], 3
    option = ContrastiveGuidance([[CONTEXTS[1]]], 0.5, reward=reward)
    plain, context = PLAIN[1], CONTEXTS[1]
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for step in range(steps):
        grown = []
        for total, tokens in beams:
            l_c, l_0 = log_p(model, context + tokens), log_p(model, plain + tokens)
            score = 1.5 * l_c[-1] - 0.5 * l_0[-1]
            if reward == "two_step" and step:
                score += 0.5 * (l_c[-2] - l_0[-2])
            grown += [(total + value, [*tokens, token]) for token, value in enumerate(score.log_softmax(-1).tolist())]
        beams = sorted(grown, reverse=True)[:4]
    more = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": steps}
    for cache in (True, False):
        assert new_tokens(model, option, [plain], **more, use_cache=cache) == [tokens for _, tokens in beams]


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_padded_batch_are_those_of_each_row(llama, more):
    found = new_tokens(llama, ContrastiveGuidance.opad([CONTEXTS]), PLAIN, **more)
    alone = [
        row
        for plain, context in zip(PLAIN, CONTEXTS)
        for row in new_tokens(llama, ContrastiveGuidance.opad([[context]]), [plain], **more)
    ]
    assert found == alone


class Uniform(LogitsProcessor):
    """Gumbel noise by row and step, so that sampling in a batch and alone can be compared."""

    def __init__(self, rows: list[int]) -> None:
        self.rows, self.seen = rows, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores)
        noise = [
            torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(row + 100 * input_ids.shape[1]))
            for row in self.rows
        ]
        return scores - (-torch.stack(noise).log()).log()


def test_processors_see_rows_of_the_loop_and_guided_scores(llama):
    processor = Uniform([0, 1, 2])
    found = new_tokens(llama, ContrastiveGuidance([CONTEXTS]), PLAIN, logits_processor=LogitsProcessorList([processor]))
    assert [scores.shape for scores in processor.seen] == [(3, VOCABULARY)] * NEW
    wanted = 2 * log_p(llama, CONTEXTS[1])[-1] - log_p(llama, PLAIN[1])[-1]
    assert torch.allclose(processor.seen[0][1].double(), wanted, atol=1e-4)
    assert found != new_tokens(llama, ContrastiveGuidance([CONTEXTS]), PLAIN)


def test_temperature_acts_after_guidance(llama):
    more = {"do_sample": True, "temperature": 0.5, "top_k": 0, "return_dict_in_generate": True, "output_scores": True}
    found = generate(llama, [ContrastiveGuidance([CONTEXTS[:1]])], torch.tensor(PLAIN[:1]), **{**GREEDY, **more})
    wanted = (2 * log_p(llama, CONTEXTS[0])[-1] - log_p(llama, PLAIN[0])[-1]) / 0.5
    assert torch.allclose(found.scores[0][0].double(), wanted, atol=1e-4)


def test_several_sequences_follow_their_own_contexts(llama):
    more = {"do_sample": True, "num_return_sequences": 2, "top_k": 1}
    found = new_tokens(llama, ContrastiveGuidance([CONTEXTS]), PLAIN, **more)
    assert found == [row for row in new_tokens(llama, ContrastiveGuidance([CONTEXTS]), PLAIN) for _ in range(2)]


def test_finished_rows_leave_the_others_as_they_are(llama):
    option = ContrastiveGuidance([CONTEXTS])
    free = new_tokens(llama, option, PLAIN)
    end = free[0][2]
    found = new_tokens(llama, option, PLAIN, eos_token_id=end)
    for row, whole in zip(found, free):
        length = whole.index(end) + 1 if end in whole else NEW
        assert row[:length] == whole[:length]
        assert set(row[length:]) <= {0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_strength_it_is_the_model_in_the_context_token_for_token(models, family):
    model = models[family]
    wanted = model.generate(**padded(CONTEXTS), **GREEDY)[:, max(map(len, CONTEXTS)) :].tolist()
    for option in (
        ContrastiveGuidance.opad([CONTEXTS], None, mask_alpha=0.3),
        ContrastiveGuidance.opad([CONTEXTS], math.inf),
        ContrastiveGuidance.classifier_free([CONTEXTS], 1.0),
        ContrastiveGuidance.context_aware([CONTEXTS], 0.0),
    ):
        assert option.needed == (False, True)
        assert new_tokens(model, option, PLAIN) == wanted
    torch.manual_seed(3)
    wanted = model.generate(**padded(CONTEXTS), **{**GREEDY, "do_sample": True})[:, max(map(len, CONTEXTS)) :].tolist()
    torch.manual_seed(3)
    assert new_tokens(model, option, PLAIN, do_sample=True) == wanted


@pytest.mark.parametrize(
    "option",
    [
        ContrastiveGuidance(),
        ContrastiveGuidance.classifier_free([CONTEXTS], 0.0),
        ContrastiveGuidance([CONTEXTS], weights=[0.0]),
    ],
    ids=["no contexts", "scale 0", "weight 0"],
)
def test_with_nothing_to_say_it_is_plain_generate_with_the_very_arguments(llama, option):
    inputs = padded(PLAIN)
    assert option.neutral
    assert option.prepare(llama, inputs) == inputs


def test_an_empty_principle_leaves_the_tokens_of_plain_generate(models):
    for model in models.values():
        wanted = model.generate(**padded(PLAIN), **GREEDY)[:, max(map(len, PLAIN)) :].tolist()
        assert new_tokens(model, ContrastiveGuidance.opad([PLAIN], 0.5), PLAIN) == wanted


def test_several_principles_are_one_pass_and_equal_the_naive_sum(llama):
    weights = (0.7, -0.4)
    option = ContrastiveGuidance([CONTEXTS, OTHER], 0.5, weights=weights)
    rows: list[int] = []
    handle = llama.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    inner = llama.model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    found = new_tokens(llama, option, PLAIN)
    handle.remove()
    inner.remove()
    assert rows == [3, 9] * NEW
    for number, row in enumerate(found):
        tokens: list[int] = []
        for _ in range(NEW):
            l_0, l_1, l_2 = (log_p(llama, rows[number] + tokens)[-1] for rows in (PLAIN, CONTEXTS, OTHER))
            change = 0.7 * (l_1 - l_0) - 0.4 * (l_2 - l_0)
            tokens.append(int((l_0 + 1.5 * change).argmax()))
        assert row == tokens


def test_an_amateur_is_another_model_on_the_plain_prompt(llama):
    amateur = built("gpt2", seed=3)
    option = ContrastiveGuidance.contrastive_decoding(amateur, 0.6, mask_alpha=0.05)
    for more in ({}, {"use_cache": False}):
        found = new_tokens(llama, option, PLAIN, **more)
        for row, plain in zip(found, PLAIN):
            tokens: list[int] = []
            for _ in range(NEW):
                expert, weak = log_p(llama, plain + tokens)[-1], log_p(amateur, plain + tokens)[-1]
                score = (1.6 * expert - 0.6 * weak).masked_fill(expert < expert.max() + math.log(0.05), -math.inf)
                tokens.append(int(score.argmax()))
            assert row == tokens
    beams = new_tokens(llama, option, PLAIN, num_beams=3)
    assert beams == new_tokens(llama, option, PLAIN, num_beams=3, use_cache=False)
    plain = llama.generate(**padded(PLAIN), **GREEDY)[:, 6:].tolist()
    assert new_tokens(llama, ContrastiveGuidance.contrastive_decoding(amateur, 0.0), PLAIN) == plain


def test_the_model_may_be_its_own_amateur_without_the_context(llama):
    found = new_tokens(llama, ContrastiveGuidance([CONTEXTS], amateur=llama), PLAIN)
    assert found == new_tokens(llama, ContrastiveGuidance([CONTEXTS]), PLAIN)


def test_the_official_rule_is_kept_with_its_errors(llama):
    plain, context = PLAIN[0], CONTEXTS[0]
    tokens: list[int] = []
    for step in range(NEW):
        with torch.no_grad():
            raw_c, raw_0 = (llama(torch.tensor([rows + tokens])).logits[0].double() for rows in (context, plain))
        l_c, l_0 = raw_c.log_softmax(-1), raw_0.log_softmax(-1)
        score = l_c[-1].clone()
        if step == 1:
            means = [x[:n].mean(0).log_softmax(-1) for x, n in ((raw_c, len(context)), (raw_0, len(plain)))]
            score += l_c[-1] - l_0[-1] + means[0] - means[1]
        elif step:
            score += l_c[-1] - l_0[-1] + l_c[-2] - l_0[-2]
        tokens.append(int(score.argmax()))
    assert new_tokens(llama, ContrastiveGuidance.opad([[context]], 1.0, "official"), [plain]) == [tokens]
    assert new_tokens(llama, ContrastiveGuidance.opad([CONTEXTS], 1.0, "official"), PLAIN)[0] == tokens
