"""The recipe `rlvr`: reinforcement learning from rewards that a program verifies, by GRPO as TRL does it.

Everything of TRL that this needs is in this file.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trialist.training.recipe import Recipe, Say, Work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class VerifiableRewards(Recipe):
    """Reinforcement learning from verified answers: GRPO rewards what a program accepts.

    Rows hold `prompt` (a string, or messages) and `answer` (a number or an expression, also at the end of a worked solution
    behind `####`, or constraints); `--data arithmetic` makes sums and differences. A group of answers to each prompt is
    sampled, and answers better than their group are made more probable. The same command goes on after an interruption, to the
    bit on the CPU.
    """

    data: str
    """Rows: Hub id, local .jsonl, .json or .parquet file or folder, or `arithmetic`"""
    validation: float = 0.0
    """Share of the prompts held out, answered before and after training"""
    length: int | None = None
    """Most tokens of a prompt with its answer; without it 1024, or the model's context if shorter"""
    epochs: float = 1.0
    """Passes over the prompts"""
    batch: int = 8
    """Answers in a micro-batch, per device; those of a step must be whole groups"""
    accumulate: int = 1
    """Micro-batches in a step"""
    learning_rate: float | None = None
    """Peak learning rate; without it 1e-6, with LoRA 1e-5"""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """Course of the learning rate after warm-up; cosine and linear end at 0"""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from 0"""
    log_every: int = 1
    """Steps between lines of progress"""
    seed: int = 0
    """Of the order of the prompts, of sampling and of adapters"""
    verifier: str = "number"
    """What accepts an answer: its last `number`, `math` (equal expressions), `ifeval` (constraints), or `module:function` of
    your own, called with the answer given and the one wanted; a row's column `verifier` goes before"""
    drop_long: bool = False
    """Leave rows out whose prompt leaves no room for an answer, instead of an error"""
    answer_length: int = 256
    """Most tokens of an answer"""
    group: int = 8
    """Answers to each prompt, at least 2"""
    temperature: float = 1.0
    """Of the sampling of answers"""
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """How the tokens of a step are averaged; TRL's `loss_type`"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation by which a reward's distance from its group's mean is divided: of the group, of the step, or none"""
    num_iterations: int = 1
    """Steps on the same answers before new ones are sampled"""
    use_vllm: bool = False
    """Sample answers with vLLM, on the same GPU; needs `pip install trl[vllm]`"""
    beta: float = 0.05
    """Weight of the divergence from the model before training; 0 needs no second model"""
    accepted: float = 10.0
    """Reward of an answer that is verified; others get 0"""
    unfinished: float = -10.0
    """Reward of an answer that has not ended within its length, whatever it says"""
    reward_model: str | None = None
    """Folder of a reward model, whose score is added to the reward"""
    reward_weight: float = 0.0
    """Weight of that score; 0 leaves it out"""

    RATES: ClassVar = (1e-6, 1e-5)
    COMPARES_PASSES: ClassVar = True
    SHOWN: ClassVar = {
        "accepted": "accepted", "eval_accepted": "validation accepted", "reward": "reward", "kl": "KL",
        "completions/mean_length": "tokens of an answer",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(answer_length=1, group=2, num_iterations=1)
        self.require_above_zero("temperature")
        self.require_not_negative("beta", "reward_weight")
        if not self.unfinished <= 0 < self.accepted:
            raise ValueError(
                f"--accepted must be above 0 and --unfinished at most 0, not {self.accepted} and {self.unfinished}"
            )
        if self.answers % self.group:
            raise ValueError(
                f"a step has {self.answers} answers (--batch x --accumulate x ranks), which are no whole groups of "
                f"{self.group}; make them a multiple of it, or change --group"
            )
        if self.validation_data == "arithmetic":
            raise ValueError(
                "--validation-data arithmetic would hold rows of the training data; pass --validation SHARE"
            )
        if self.checkpoint_every is not None and self.checkpoint_every % self.num_iterations:
            raise ValueError(
                f"--checkpoint-every {self.checkpoint_every} would save between steps on the same answers, which are not kept; "
                f"take a multiple of --num-iterations {self.num_iterations}"
            )
        if self.use_vllm and self.device == "cpu":
            raise ValueError("--use-vllm needs an accelerator; leave out --device cpu")
        if self.reward_weight and self.reward_model is None:
            raise ValueError("--reward-weight needs --reward-model: without it there is nothing to weigh")

    @property
    def answers(self) -> int:
        """Sampled for a step, over all ranks."""
        return self.batch * self.accumulate * int(os.environ.get("WORLD_SIZE", "1"))

    def train(self, work: Work) -> Mapping[str, Any]:
        from trialist.models.loading import load_model

        rows, held_out = self._examples(work)
        work.say(f"{len(rows):,} prompts, {self.group} answers to each; held out: {len(held_out):,}")
        model = load_model(self.model, dtype=self.weights_dtype)
        trainer = self._trainer(work, model, rows, held_out)
        return self.run(work, trainer, {"prompts": len(rows)}, {"eval_accepted": "accepted"}, _accepted)

    def contents(self) -> dict[str, str]:
        from trialist.data.verifiers import source_of
        from trialist.models.loading import model_digest

        digests = super().contents()
        if self.reward_weight and self.reward_model is not None:
            digests["reward model content"] = model_digest(self.reward_model)
        if (program := source_of(self.verifier)) is not None:
            digests["verifier content"] = hashlib.sha256(Path(program).read_bytes()).hexdigest()
        return digests

    def data_files(self) -> str:
        from trialist.data import verifiable

        return str(verifiable.__file__) if self.data == verifiable.ARITHMETIC else self.data

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, *, data: str | None = None, say: Say = lambda _: None
    ) -> Rows:
        """The rows, checked. Raises ValueError for a prompt that leaves no room for an answer, and for messages without a
        chat template."""
        from trialist.data.verifiable import read_verifiable

        source = data or self.data
        rows = read_verifiable(
            source, columns=self.columns, split=None if data else self.split, max_examples=self.max_examples,
            verifier=self.verifier,
        )  # fmt: skip
        if self.chat:
            rows = [{**row, "prompt": _turn(row["prompt"])} for row in rows]
        if not isinstance(rows[0]["prompt"], str) and tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {self.model} has no chat template, which messages need; pass --chat-template FILE, or give "
                "string prompts, without --chat"
            )
        _, length = self.limits()
        room = length - self.answer_length
        if room < 1:
            raise ValueError(
                f"--answer-length {self.answer_length} leaves no room for a prompt within {length} tokens; lower it, or raise "
                "--length"
            )
        kept: Rows = []
        for number, row in enumerate(rows, start=1):
            if (size := _size(tokenizer, row["prompt"])) <= room:
                kept.append(row)
            elif not self.drop_long:
                raise ValueError(
                    f"{source} row {number}: the prompt has {size:,} tokens, and beside an answer of {self.answer_length:,} "
                    f"there is room for {room:,}; lower --answer-length, raise --length, or leave such rows out with --drop-long"
                )
        if not kept:
            raise ValueError(
                f"{source}: all {len(rows):,} prompts have more than {room:,} tokens; lower --answer-length"
            )
        if len(kept) < len(rows):
            say(
                f"note: {source}: {len(rows) - len(kept):,} of {len(rows):,} prompts leave no room for an answer: left out"
            )
        return kept

    def _examples(self, work: Work) -> tuple[Rows, Rows]:
        _require_trl(self.use_vllm)
        rows = self.prompts(work.tokenizer, say=work.say)
        if self.validation_data is not None:
            return rows, self.prompts(work.tokenizer, data=self.validation_data, say=work.say)
        if not self.validation:
            return rows, []
        kept, held_out = self.hold_out([_text(row["prompt"]) for row in rows])
        return [rows[i] for i in kept], [rows[i] for i in held_out]

    def _trainer(self, work: Work, model: Any, rows: Rows, held_out: Rows) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        tokenizer: Any = work.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        trained = self.prepared(model)
        judges: list[Any] = [self._verifier(model, tokenizer)]
        if self.reward_weight and self.reward_model is not None:
            from trialist.models.reward_scoring import RewardScorer

            scorer = RewardScorer.load(
                self.reward_model, length=work.length, batch=self.batch, device=str(self.compute_device)
            )
            judges.append(scorer.rewards)
        total = self.total_steps(len(rows) * self.group * self.num_iterations)  # a pass is one over all answers
        often = self.checkpoint_every or math.ceil(total / 10)
        arguments = self.arguments(
            work,
            total,
            bool(held_out),
            GRPOConfig,
            save_steps=math.ceil(often / self.num_iterations) * self.num_iterations,
            per_device_eval_batch_size=self.group * max(1, self.batch // self.group),
            num_generations=self.group,
            max_completion_length=self.answer_length,
            temperature=self.temperature,
            loss_type=self.loss,
            beta=self.beta,
            scale_rewards=self.scale_rewards,
            num_iterations=self.num_iterations,
            use_vllm=self.use_vllm,
            reward_weights=[1.0, self.reward_weight] if self.reward_weight else None,
            gradient_checkpointing=False,  # the model has it on already where it was asked for
        )
        trainer = GRPOTrainer(
            model=trained,
            reward_funcs=judges,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=tokenizer,
            optimizers=self.optimizers(trained),
        )
        if trainer.ref_model is not None:
            reference = trainer.accelerator.unwrap_model(trainer.ref_model)
            if type(reference) is not type(model):
                raise ValueError(
                    f"TRL has loaded a {type(reference).__name__} as the reference of this {type(model).__name__}; train "
                    "adapters with --lora, or set --beta 0"
                )
        return trainer

    def _verifier(self, model: Any, tokenizer: Any) -> Callable[..., list[float]]:
        """The reward function in TRL's form. It also logs the share of verified answers, as `accepted`."""
        from trialist.data.verifiable import rewards

        more = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])}

        def verified(
            completions: Sequence[Any],
            completion_ids: Sequence[Sequence[int]],
            answer: Sequence[str],
            verifier: Sequence[str],
            log_metric: Callable[[str, float], None],
            **others: Any,
        ) -> list[float]:
            texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
            ended = [len(ids) > 0 and ids[-1] in ends for ids in completion_ids]
            found = rewards(texts, answer, verifier, ended, accepted=self.accepted, unfinished=self.unfinished)
            log_metric("accepted", sum(value == self.accepted for value in found) / len(found))
            return found

        return verified


def _require_trl(vllm: bool) -> None:
    """Raises ImportError that says what to install. vllm: whether answers are sampled with it."""
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise ImportError("learning from verified rewards needs TRL: `pip install trialist[trl]`")
    if vllm and find_spec("vllm") is None:
        raise ImportError("--use-vllm needs vLLM, which is not installed: `pip install trl[vllm]`, or leave it out")


def _turn(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _size(tokenizer: Any, prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _accepted(trainer: Any) -> dict[str, float]:
    """The share of verified answers in the first and the last tenth of the steps."""
    shares = [entry["accepted"] for entry in trainer.state.log_history if "accepted" in entry]
    part = max(1, len(shares) // 10)
    return {
        "accepted at the start": round(math.fsum(shares[:part]) / part, 4),
        "accepted at the end": round(math.fsum(shares[-part:]) / part, 4),
    }
