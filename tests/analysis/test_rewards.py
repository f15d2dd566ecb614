from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from trialist.analysis.rewards import RewardsAnalysis
from trialist.data.augment_preferences import augment_preferences
from trialist.data.filter_preferences import filter_by_reward_model
from trialist.data.preferences import encode_preferences
from trialist.data.tokenizers import byte_tokenizer
from trialist.models.reward_model import pair_rewards

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 64}  # fmt: skip
ROWS = [{"prompt": f"{n}? ", "chosen": f"yes {n * n}", "rejected": "no" * (1 + n % 3)} for n in range(7)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=258, initializer_range=0.5)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    byte_tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path


def written(folder: Path, rows) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


class Counting(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.seen = model, model.config, []

    def forward(self, input_ids, attention_mask):
        self.seen += [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask)]
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_fifteen_pairs_of_an_anchor_take_six_forwards(folder):
    model = Counting(LlamaForSequenceClassification.from_pretrained(folder / "rm").eval())
    pairs, _ = encode_preferences(augment_preferences(ROWS, sample_fraction=1.0), byte_tokenizer(), max_length=64)
    rewards, scored = pair_rewards(model, pairs, pad_token_id=258, batch=5)
    distinct = {(*pair.prompt, *answer) for pair in pairs for answer in (pair.chosen, pair.rejected)}
    assert len(model.seen) == len(set(model.seen)) == scored == len(distinct) <= 6 * 7
    for pair, (chosen, rejected) in list(zip(pairs, rewards))[::9]:
        for answer, reward in ((pair.chosen, chosen), (pair.rejected, rejected)):
            with torch.no_grad():
                alone = model.model(torch.tensor([pair.prompt + answer])).logits.item()
            assert reward == pytest.approx(alone, abs=1e-4)


def test_scored_rows_say_how_often_the_model_agrees_and_are_what_the_filter_reads(folder):
    rows = augment_preferences(ROWS, sample_fraction=1.0)
    shown = RewardsAnalysis(str(folder / "rm"), written(folder, rows), str(folder / "scored.jsonl"), device="cpu")(
        say=print
    )
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert len(scored) == len(rows)
    assert set(shown) == {
        "accuracy, original", "accuracy, non-contextual", "distance, neutral", "pairs", "sequences scored", "data",
    }  # fmt: skip
    own = [row for row in scored if row["pair_type"] == "original"]
    right = sum(row["chosen_reward"] > row["rejected_reward"] for row in own)
    assert shown["accuracy, original"] == f"{right / 7:.4f} of 7"
    ties = [abs(row["chosen_reward"] - row["rejected_reward"]) for row in scored if row["label_prob"] == 0.5]
    assert shown["distance, neutral"] == f"{sum(ties) / len(ties):.4f} on average over {len(ties)} ties"
    assert 7 <= len(filter_by_reward_model(scored)) < len(scored)


def test_an_interrupted_scoring_goes_on_with_what_is_missing(folder, monkeypatch):
    from trialist.models import reward_model

    data, output = written(folder, augment_preferences(ROWS, sample_fraction=1.0)), folder / "scored.jsonl"
    monkeypatch.setenv("TRIALIST_CACHE", str(folder / "cache"))
    monkeypatch.setattr(reward_model, "PART", 10)
    whole, scored = reward_model.sequence_scores, []

    def interrupted(model, ids, mask):
        if len(scored) == 5:
            raise KeyboardInterrupt
        return watched(model, ids, mask)

    def watched(model, ids, mask):
        scored.append(len(ids))
        return whole(model, ids, mask)

    monkeypatch.setattr(reward_model, "sequence_scores", interrupted)
    run = RewardsAnalysis(str(folder / "rm"), data, str(output), batch=5, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(say=lambda text: None)
    assert not output.exists()
    monkeypatch.setattr(reward_model, "sequence_scores", watched)
    shown = run(say=lambda text: None)
    total = int(shown["sequences scored"].split()[0])
    assert 30 < total == sum(scored) - 5  # the fifth batch was of a part that was not whole
    scored.clear()
    output.rename(folder / "first.jsonl")
    run(say=lambda text: None)
    assert not scored
    assert output.read_text() == (folder / "first.jsonl").read_text()
    monkeypatch.setenv("TRIALIST_CACHE", str(folder / "another"))
    output.unlink()
    run(say=lambda text: None)
    assert output.read_text() == (folder / "first.jsonl").read_text()


@pytest.mark.parametrize("label", [1.5, "high"])
def test_a_label_that_is_no_probability_is_named_with_its_row(folder, label):
    data = written(folder, [*ROWS, {**ROWS[0], "label_prob": label}])
    with pytest.raises(ValueError, match=f"rows.jsonl row 8: label_prob is {label!r}"):
        RewardsAnalysis(str(folder / "rm"), data, str(folder / "scored.jsonl"), device="cpu")()


def test_rewards_that_are_no_numbers_are_not_written(folder):
    model = LlamaForSequenceClassification.from_pretrained(folder / "rm")
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(folder / "rm")
    with pytest.raises(ValueError, match="row 1: the model's rewards are nan and nan"):
        RewardsAnalysis(str(folder / "rm"), written(folder, ROWS), str(folder / "scored.jsonl"), device="cpu")()
    assert not (folder / "scored.jsonl").exists()


def test_what_cannot_work_is_said_and_nothing_is_written(folder):
    data = written(folder, ROWS)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "lm")
    byte_tokenizer().save_pretrained(folder / "lm")
    output = str(folder / "scored.jsonl")
    with pytest.raises(ValueError, match="is no reward model: it has no head"):
        RewardsAnalysis(str(folder / "lm"), data, output)()
    with pytest.raises(ValueError, match="--length 65 is longer than"):
        RewardsAnalysis(str(folder / "rm"), data, output, length=65)()
    with pytest.raises(ValueError, match="--batch must be at least 1"):
        RewardsAnalysis(str(folder / "rm"), data, output, batch=0)()
    with pytest.raises(ValueError, match="exists; give another path"):
        RewardsAnalysis(str(folder / "rm"), data, data)()
    assert not Path(output).exists()
