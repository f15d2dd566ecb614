from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

pytest.importorskip("trl", reason="the extra `trl` is not installed")

from tests.training.conftest import tiny_llama
from trialist.data.tokenizers import byte_tokenizer
from trialist.models.loading import load_model
from trialist.training import progress
from trialist.training.output import ModelOutput
from trialist.training.recipe import Work
from trialist.training.rlvr import VerifiableRewards

CHATML = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny Llama with the byte tokenizer, which ends its answers now and then."""
    folder = tmp_path_factory.mktemp("rlvr") / "model"
    llama = tiny_llama(vocab_size=259, max_position_embeddings=96)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    llama.config.eos_token_id = llama.generation_config.eos_token_id = tokenizer.eos_token_id
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe(model, output, **options) -> VerifiableRewards:
    given = {"data": "arithmetic", "max_examples": 6, "steps": 3, "group": 3, "batch": 6, "answer_length": 5, "beta": 0.0,
             "learning_rate": 3e-3, "checkpoint_every": 1, "device": "cpu"}  # fmt: skip
    return VerifiableRewards(model=str(model), output=str(output), **{**given, **options})


def run(model, output, **options):
    said: list[str] = []
    return recipe(model, output, **options)(said.append), said


def work(own, tokenizer, folder) -> Work:
    return Work(tokenizer, *own.limits(), ModelOutput(folder, {}), lambda text: None)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_it_leaves_a_model_that_loads_and_generates(model, tmp_path):
    result, said = run(model, tmp_path / "out", unfinished=-1.0, validation=0.4)
    assert result["steps"] == 3
    assert 0 <= result["validation accepted after"] <= 1
    assert any(line.startswith("step 3/3") and "accepted" in line for line in said)
    trained, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("1 + 1", return_tensors="pt")
    assert trained.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3
    before, after = weights(model), weights(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    again, told = run(model, tmp_path / "out", unfinished=-1.0, validation=0.4)
    assert again == result
    assert "holds the finished model" in told[0]


def test_equal_rewards_teach_nothing(model, tmp_path):
    run(model, tmp_path / "out", unfinished=0.0, max_examples=3)  # no answer of random bytes is right
    before, after = weights(model), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"num_iterations": 2, "checkpoint_every": 2}])
def test_a_killed_run_goes_on_to_the_bit(model, tmp_path, monkeypatch, options):
    def kill(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def interrupted():
        monkeypatch.setattr(progress.Lines, "on_pre_optimizer_step", kill, raising=False)
        run(model, tmp_path / "killed", unfinished=-1.0, steps=4, **options)

    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _, said = run(model, tmp_path / "killed", unfinished=-1.0, steps=4, **options)
    assert "goes on from step 2" in said
    run(model, tmp_path / "whole", unfinished=-1.0, steps=4, **options)
    a, b = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)


class Batch:
    """A trainer of the recipe, and a batch of three answers of lengths 4, 2 and 3 to prompts of two lengths."""

    def __init__(self, model, folder, **options):
        own = recipe(model, folder, batch=3, **options)
        loaded, tokenizer = load_model(model), AutoTokenizer.from_pretrained(model)
        rows = own.prompts(tokenizer)
        self.trainer = own._trainer(work(own, tokenizer, folder), loaded, rows, [])
        generator = torch.Generator().manual_seed(5)
        self.lengths = torch.tensor([4, 2, 3])
        mask = (torch.arange(4) < self.lengths[:, None]).long()
        self.inputs = {
            "prompt_ids": torch.randint(3, 250, (3, 6), generator=generator),
            "prompt_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6]),
            "completion_ids": torch.randint(3, 250, (3, 4), generator=generator) * mask,
            "completion_mask": mask,
            "advantages": torch.tensor([1.0, -0.7, 0.2]),
            "num_items_in_batch": mask.sum(),
        }
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1

    def loss(self):
        return self.trainer._compute_loss(self.trainer.model, dict(self.inputs))

    def gradients(self, loss):
        self.trainer.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in self.trainer.model.parameters() if p.grad is not None])

    def log_probabilities(self, model):
        """Of the answers' tokens, row by row without padding."""
        found = []
        for row, length in enumerate(self.lengths):
            prompt = self.inputs["prompt_ids"][row][self.inputs["prompt_mask"][row].bool()]
            ids = torch.cat([prompt, self.inputs["completion_ids"][row, :length]])[None]
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
        return found


def test_each_answer_is_learned_from_as_often_as_there_are_iterations(model, tmp_path, monkeypatch):
    from trl import GRPOTrainer

    sampled, make = [], GRPOTrainer._generate_and_score_completions

    def counted(self, inputs):
        sampled.append(len(inputs))
        return make(self, inputs)

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", counted)
    result, _ = run(model, tmp_path / "out", steps=None, num_iterations=3, checkpoint_every=3, max_examples=4)
    assert sampled == [6, 6]  # two prompts a step, three answers to each
    assert result["steps"] == 2 * 3


def test_without_scaling_an_advantage_is_the_distance_from_the_mean_of_the_group(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {}
    for scale in ("none", "group"):
        own = recipe(model, tmp_path / scale, scale_rewards=scale, batch=3, max_examples=1)
        trainer = own._trainer(work(own, tokenizer, tmp_path / scale), load_model(model), own.prompts(tokenizer), [])
        trainer.model.train()
        trainer._calculate_rewards = lambda *_: torch.tensor([[10.0], [0.0], [-10.0]])
        found[scale] = trainer._generate_and_score_completions(own.prompts(tokenizer) * 3)["advantages"]
    assert found["none"].tolist() == pytest.approx([10.0, 0.0, -10.0])
    assert found["group"].tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-3)  # the deviation of 10, 0, -10 is 10


def test_the_reference_must_be_of_the_models_own_class(model, tmp_path):
    """TRL loads the reference by its name, and so without what was swapped into the model."""

    class Swapped(LlamaForCausalLM):
        pass

    own, tokenizer = recipe(model, tmp_path / "out", beta=0.1), AutoTokenizer.from_pretrained(model)
    given = Swapped.from_pretrained(model)
    with pytest.raises(
        ValueError, match="a LlamaForCausalLM as the reference of this Swapped; train adapters with --lora"
    ):
        own._trainer(work(own, tokenizer, tmp_path / "out"), given, own.prompts(tokenizer), [])


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "dr_grpo", "grpo"])
def test_one_iteration_is_reinforce_with_the_group_as_baseline(model, tmp_path, loss):
    batch = Batch(model, tmp_path / "out", loss=loss)
    advantages, lengths = batch.inputs["advantages"], batch.lengths
    weight = {  # of each row's tokens
        "dapo": torch.full((3,), 1 / lengths.sum()),
        "bnpo": torch.full((3,), 1 / lengths.sum()),
        "dr_grpo": torch.full((3,), 1 / (3 * 5)),  # rows x the most tokens of an answer
        "grpo": 1 / (3 * lengths),
    }[loss]
    found = batch.loss()
    assert found.item() == pytest.approx(-(advantages * lengths * weight).sum().item(), abs=1e-6)  # every ratio is 1
    gradients = batch.gradients(found)
    plain = load_model(model).train()
    expected = -sum(
        a * w * row.sum() for a, w, row in zip(advantages, weight, batch.log_probabilities(plain), strict=True)
    )
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_the_divergence_from_the_reference_is_the_nonnegative_estimate(model, tmp_path):
    batch = Batch(model, tmp_path / "out", beta=0.5)
    batch.inputs["advantages"] = torch.zeros(3)
    reference = [row.detach() + 0.3 * (-1) ** k for k, row in enumerate(batch.log_probabilities(load_model(model)))]
    padded = torch.zeros(3, 4)
    for row, values in enumerate(reference):
        padded[row, : len(values)] = values
    batch.inputs["ref_per_token_logps"] = padded
    own = batch.log_probabilities(load_model(model))
    k3 = torch.cat([torch.exp(r - o) - (r - o) - 1 for r, o in zip(reference, own, strict=True)])
    assert (k3 > 0).all()
    assert batch.loss().item() == pytest.approx(0.5 * k3.mean().item(), rel=1e-4)


def test_what_follows_the_end_of_an_answer_does_not_count(model, tmp_path):
    own = recipe(model, tmp_path / "out", answer_length=60, max_examples=2)
    loaded, tokenizer = load_model(model), AutoTokenizer.from_pretrained(model)
    end = tokenizer.eos_token_id
    loaded.lm_head.weight.data[end] *= 0
    rows = own.prompts(tokenizer)
    trainer = own._trainer(work(own, tokenizer, tmp_path / "out"), loaded, rows, [])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([row for row in rows for _ in range(3)])
    ended = 0
    for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
        counted = ids[mask.bool()]
        assert (counted[:-1] != end).all()
        ended += int(counted[-1] == end and len(counted) < 60)
    assert ended > 0


def test_the_verifier_reads_strings_and_messages_and_looks_for_the_end(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge = recipe(model, tmp_path)._verifier(load_model(model), tokenizer)
    end, logged = tokenizer.eos_token_id, []
    found = judge(
        completions=["it is 5", [{"role": "assistant", "content": "it is 5"}], "5", "6"],
        completion_ids=[[7, end], [7, end], [7], [7, end]],
        answer=["5"] * 4,
        verifier=["number"] * 4,
        log_metric=lambda name, value: logged.append((name, value)),
        trainer_state=None,
    )
    assert found == [10.0, 10.0, -10.0, 0.0]
    assert logged == [("accepted", 0.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 1}, "--group must be at least 2, not 1"),
        ({"batch": 4}, r"a step has 4 answers .* no whole groups of 3"),
        ({"unfinished": 1.0}, "--accepted must be above 0 and --unfinished at most 0"),
        ({"beta": -1.0}, "--beta must be at least 0"),
        ({"temperature": 0.0}, "--temperature must be > 0"),
        ({"reward_weight": 1.0}, "--reward-weight needs --reward-model"),
        ({"num_iterations": 2, "checkpoint_every": 3}, "take a multiple of --num-iterations 2"),
        ({"use_vllm": True}, "--use-vllm needs an accelerator"),
        ({"validation_data": "arithmetic"}, "would hold rows of the training data"),
    ],
)
def test_options_that_cannot_work_are_refused(model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        recipe(model, tmp_path / "out", **change)


def test_prompts_without_room_for_an_answer_are_named(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "short", "answer": "1"}, {"prompt": "long " * 30, "answer": "1"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match="row 2: the prompt has 150 tokens, and beside an answer of 5 there is room for 91"
    ):
        run(model, tmp_path / "out", data=str(data))
    own, said = recipe(model, tmp_path / "out", data=str(data), drop_long=True), []
    assert [row["prompt"] for row in own.prompts(AutoTokenizer.from_pretrained(model), say=said.append)] == ["short"]
    assert said == [f"note: {data}: 1 of 2 prompts leave no room for an answer: left out"]
    with pytest.raises(ValueError, match="--answer-length 96 leaves no room"):
        run(model, tmp_path / "out", answer_length=96)
    assert not (tmp_path / "out").exists()


def test_a_verifier_of_ones_own_decides_and_is_part_of_what_made_the_model(model, tmp_path, monkeypatch):
    (tmp_path / "judging.py").write_text("def short(completion, answer):\n    return len(completion) < 9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "?", "answer": "-"}\n')
    own = recipe(model, tmp_path / "out", data=str(rows), verifier="judging:short")
    tokenizer = AutoTokenizer.from_pretrained(model)
    (row,) = own.prompts(tokenizer)
    end = tokenizer.eos_token_id
    found = own._verifier(load_model(model), tokenizer)(
        completions=["brief", "not so brief"], completion_ids=[[7, end]] * 2, answer=[row["answer"]] * 2,
        verifier=[row["verifier"]] * 2, log_metric=lambda *_: None,
    )  # fmt: skip
    assert found == [10.0, 0.0]
    before = own.contents()["verifier content"]
    (tmp_path / "judging.py").write_text("def short(completion, answer):\n    return len(completion) < 5\n")
    assert own.contents()["verifier content"] != before


def test_what_samples_and_what_judges_must_be_installed(model, tmp_path, monkeypatch):
    own = recipe(model, tmp_path / "out", use_vllm=True, device="auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else name)
    with pytest.raises(ImportError, match=r"--use-vllm needs vLLM, which is not installed: `pip install trl\[vllm\]`"):
        own.check()


def test_messages_need_a_chat_template(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    own = dataclasses.replace(recipe(model, tmp_path / "out"), chat=True)
    assert own.prompts(tokenizer)[0]["prompt"][0]["role"] == "user"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        own.prompts(tokenizer)
