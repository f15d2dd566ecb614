"""What the trial of progressive precision stands on: a model and its nested copy, prompts, and what the full model writes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Outcome
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import new_decoder, save, train
from trialist.trials._pruning import stored_outcome
from trialist.trials._text import load_rows

if TYPE_CHECKING:
    from torch import Tensor

    from trialist.trials.pmpd import PMPDTrial

SAMPLED, GREEDY = "sampled", "greedy"
RECALL: dict[str, Any] = {
    "layers": 3,
    "width": 64,
    "heads": 4,
    "fewest": 2,
    "most": 10,
    "batch": 64,
    "learning_rate": 2e-3,
}
"""Model and training of the recall task"""
ITEMS_OF_RECALL = 40_002
"""Seed of the questions that are asked, the same for every seed of the trial"""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its nested copy at the highest precision, and its training as an outcome."""

    dense: Any
    nested: Any
    tokenizer: Any
    trained: Outcome


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of any lengths, with ids and clusters for the statistics."""

    ids: tuple[str, ...]
    clusters: tuple[str, ...] | None
    token_ids: tuple[tuple[int, ...], ...]

    def batches(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, len(self.ids), size)]

    def padded(self, part: slice, device: Any) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, P), padded on the left."""
        import torch

        rows = self.token_ids[part]
        P = max(map(len, rows))
        tokens, mask = torch.zeros(len(rows), P, dtype=torch.long), torch.zeros(len(rows), P, dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, P - len(ids) :], mask[row, P - len(ids) :] = torch.tensor(ids), 1
        return tokens.to(device), mask.to(device)


@dataclass(frozen=True)
class PrecisionModels:
    """The stages of one run."""

    trial: PMPDTrial
    context: Context
    shuffled: bool

    @functools.cached_property
    def text(self) -> tuple[Path, Any]:
        return self.trial.prepared(self.context, shuffled=self.shuffled)

    @property
    def key(self) -> tuple:
        """What the models depend on. The text's folder is named by its content."""
        trial = self.trial
        where = (
            resolve_device(trial.device),
            trial.dtype,
            trial.parent,
            trial.lowest,
            trial.calibration_rows,
            trial.length,
        )
        if trial.given:
            from trialist.models.loading import model_digest

            return (model_digest(trial.model), self.text[0].name, *where)
        return (self.text[0].name, trial.layers, trial.width, trial.heads, trial.batch, trial.steps, trial.learning_rate, *where,
                self.context.seed)  # fmt: skip

    def subject(self) -> Subject | Outcome:
        """The models; the outcome where training diverged."""
        from trialist.models.loading import load_model

        trial, device = self.trial, resolve_device(self.trial.device)
        if trial.given:
            trained, dense = Outcome(), load_model(trial.model, device=device)
        else:
            stage = self.context.stage("model", self.key, self.build)
            trained = stored_outcome(stage / "outcome.json")
            if trained.diverged is not None:
                return trained
            dense = load_model(str(stage / "model"), device=device)
        folder = self.context.stage("nested", self.key, functools.partial(self.build_nested, dense))
        nested = load_model(str(folder / "model"), device=device)
        return Subject(dense.eval(), nested.eval(), self.text[1], trained)

    def build(self, folder: Path) -> None:
        """Fills a stage: the trained decoder in `model`, and its training in `outcome.json`."""
        trial, (text, tokenizer) = self.trial, self.text
        own = dataclasses.replace(self.context, keep_model=False, folder=self.context.folder / "base")
        model = new_decoder(
            own, device=resolve_device(trial.device), vocab_size=len(tokenizer), hidden_size=trial.width,
            num_hidden_layers=trial.layers, num_attention_heads=trial.heads, head_dim=trial.width // trial.heads,
            layer_types=["full_attention"] * trial.layers, max_position_embeddings=trial.length,
        )  # fmt: skip
        outcome, _ = trial.fit_text(
            model, text, own, learning_rate=trial.learning_rate, part="validation", evaluations=2
        )
        _store(model, tokenizer, outcome, folder)

    def build_nested(self, dense: Any, folder: Path) -> None:
        """Fills a stage with the nested copy, calibrated on validation text."""
        import copy

        rows = load_rows(self.text[0], "validation")[0]
        calibration = rows.rows(slice(0, self.trial.calibration_rows))
        nested = quantised(copy.deepcopy(dense), self.trial, calibration)
        save(nested, self.text[1], folder / "model")

    def prompts(self) -> Prompts:
        """Prompts of the user's or of a benchmark, through the chat template where there is one; else windows of test text."""
        trial = self.trial
        if trial.prompts:
            return given_prompts(trial.prompts, self.text[1], trial.items, trial.prompt_length)
        rows = load_rows(self.text[0], "test")[0]
        flat, L = rows.tokens.reshape(-1), trial.prompt_length
        windows = [
            (int(document), start)
            for document, offset, size in rows.pieces.tolist()
            for start in range(offset, offset + size - L + 1, L)
        ]
        if len(windows) < trial.items:
            raise ValueError(
                f"the test text has {len(windows)} windows of {L} tokens for --items {trial.items}; raise --test-bytes, or lower "
                "--items or --prompt-length"
            )
        chosen = [windows[at * len(windows) // trial.items] for at in range(trial.items)]
        return Prompts(
            tuple(f"token {start}" for _, start in chosen),
            tuple(f"document {document}" for document, _ in chosen),
            tuple(tuple(flat[start : start + L].tolist()) for _, start in chosen),
        )

    def references(self, subject: Subject, prompts: Prompts) -> dict[str, Tensor]:
        """What the full model writes, (items, steps + 1): drawn at temperature 1, and by greedy search. Texts do not end."""
        import hashlib

        from safetensors.torch import load_file

        digest = hashlib.sha256(repr(prompts.token_ids).encode()).hexdigest()
        inputs = (*self.key, digest, self.trial.decode_steps, self.trial.at_once, self.context.seed)

        def build(folder: Path) -> None:
            import torch
            from safetensors.torch import save_file

            drawn = self.context.stream("reference texts")
            texts = {
                name: torch.cat([
                    self.written(subject.dense, prompts, part, (), seed)
                    for part in prompts.batches(self.trial.at_once)
                ]).cpu()
                for name, seed in ((SAMPLED, drawn), (GREEDY, None))
            }  # fmt: skip
            save_file(texts, folder / "texts.safetensors")

        return load_file(self.context.stage("references", inputs, build) / "texts.safetensors")

    def written(self, model: Any, prompts: Prompts, part: slice, options: Sequence[Any], seed: int | None) -> Tensor:
        """Continuations (B, steps + 1), greedy or drawn with the random numbers of a seed, which are those of every arm."""
        from trialist.decoding.options import generate

        tokens, mask = prompts.padded(part, model.device)
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        noise = [] if seed is None else [_Gumbel(seed, part.start, tokens.shape[1])]
        length = self.trial.decode_steps + 1
        text = generate(
            model, options, tokens, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, do_sample=False,
            num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, suppress_tokens=ends or None,
            logits_processor=noise,
            pad_token_id=0,
        )  # fmt: skip
        return text[:, tokens.shape[1] :]

    def recall(self) -> tuple[Any, dict[str, Tensor]] | None:
        """The nested model of the recall task and its questions; None where its training diverged."""
        from trialist.models.loading import load_model

        trial = self.trial
        inputs = (*RECALL.items(), trial.recall_steps, trial.fillers, trial.parent, trial.lowest, resolve_device(trial.device),
                  trial.dtype, self.context.seed)  # fmt: skip
        stage = self.context.stage("recall", inputs, self.build_recall)
        if stored_outcome(stage / "outcome.json").diverged is not None:
            return None
        model = load_model(str(stage / "nested"), device=resolve_device(trial.device)).eval()
        questions = with_fillers(256, RECALL["most"], trial.fillers, [ITEMS_OF_RECALL])
        return model, {name: x.to(model.device) for name, x in questions.items()}

    def build_recall(self, folder: Path) -> None:
        import numpy as np

        from trialist.data.recall import VOCABULARY

        trial, device = self.trial, resolve_device(self.trial.device)
        own = dataclasses.replace(self.context, keep_model=False, folder=self.context.folder / "recall")
        model = new_decoder(
            own, device=device, vocab_size=VOCABULARY.size, hidden_size=RECALL["width"], num_hidden_layers=RECALL["layers"],
            num_attention_heads=RECALL["heads"], head_dim=RECALL["width"] // RECALL["heads"],
            layer_types=["full_attention"] * RECALL["layers"], max_position_embeddings=2 * RECALL["most"] + trial.fillers + 3,
        )  # fmt: skip
        seed = self.context.stream("recall")

        def batch(step: int) -> dict[str, Tensor]:
            drawn = np.random.default_rng([seed, step, 1])
            pairs = int(drawn.integers(RECALL["fewest"], RECALL["most"] + 1))
            rows = with_fillers(RECALL["batch"], pairs, int(drawn.integers(0, trial.fillers + 1)), [seed, step])
            return {name: x.to(device) for name, x in rows.items()}

        outcome, _ = train(
            model, batch, own, steps=trial.recall_steps, learning_rate=RECALL["learning_rate"], dtype=trial.dtype,
            evaluate=lambda _: {}, evaluations=1,
        )  # fmt: skip
        _store(model, None, outcome, folder)
        if outcome.diverged is None:
            calibration = with_fillers(
                trial.calibration_rows, RECALL["most"], trial.fillers, [seed, trial.recall_steps]
            )
            quantised(model, trial, calibration).save_pretrained(folder / "nested")


class _Gumbel:
    """A logits processor that makes greedy search a draw: Gumbel noise of a seed, the batch's first item and the step."""

    def __init__(self, seed: int, first: int, length: int) -> None:
        self.seed, self.first, self.length = seed, first, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        place = self.first * 1_000_003 + input_ids.shape[1] - self.length
        generator = torch.Generator().manual_seed((self.seed + place) % 2**63)
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
        return scores - (-uniform.log()).log().to(scores)


def quantised(model: Any, trial: PMPDTrial, calibration: dict[str, Tensor]) -> Any:
    """The model, made nested in place."""
    from trialist.models.nested.quantizer import NestedQuantConfig
    from trialist.weights.nested import quantize_nested

    config = NestedQuantConfig(
        seed_bits=trial.lowest, parent_bits=trial.parent, calibration_samples=trial.calibration_rows,
        calibration_length=int(calibration["input_ids"].shape[1]),
    )  # fmt: skip
    quantize_nested(model, config, calibration)
    return model


def with_fillers(rows: int, pairs: int, fillers: int, seed: Sequence[int]) -> dict[str, Tensor]:
    """Variable assignment with symbols that say nothing before the question: `input_ids`, `labels` (B, 2n + k + 3).

    The label is the answer, which ends every row.
    """
    import numpy as np
    import torch

    from trialist.data.recall import VOCABULARY, variable_assignment

    plain = variable_assignment(rows, pairs, generator=np.random.default_rng(list(seed)))
    filling = torch.full((rows, fillers), VOCABULARY.separator)
    tokens = torch.cat([plain["input_ids"][:, :-2], filling, plain["input_ids"][:, -2:]], 1)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    return {"input_ids": tokens, "labels": labels}


def given_prompts(source: str, tokenizer: Any, items: int, longest: int) -> Prompts:
    """The first prompts of a benchmark's questions, or of a file, that have at most `longest` tokens, the shortest first."""
    from trialist.decoding.prompt_files import Writing, encode_all

    found = encode_all(Writing(tokenizer), said_prompts(source), source)
    kept = [(number, prompt.token_ids) for number, prompt in enumerate(found) if len(prompt.token_ids) <= longest][
        :items
    ]
    if len(kept) < items:
        raise ValueError(
            f"--prompts {source} has {len(kept)} prompts of at most --prompt-length {longest} tokens for --items {items}; raise "
            "--prompt-length, or lower --items"
        )
    kept.sort(key=lambda entry: (len(entry[1]), entry[0]))
    return Prompts(tuple(f"prompt {number}" for number, _ in kept), None, tuple(ids for _, ids in kept))


def said_prompts(source: str) -> list[tuple[str, Any]]:
    """(place, prompt) of a file, or of the questions of a benchmark of the asset. Raises ValueError or FileNotFoundError."""
    if Path(source).expanduser().is_file():
        from trialist.decoding.prompt_files import read_prompts

        return read_prompts(source)
    from trialist.data.benchmarks import documents

    rows = documents(source)
    if "question" not in rows[0]:
        raise ValueError(f"--prompts {source}: its rows have no question; give gsm8k, or a file with a prompt a line")
    return [(f"question {number}", row["question"]) for number, row in enumerate(rows)]


def prompts_digest(source: str) -> str:
    import hashlib

    return hashlib.sha256(repr(said_prompts(source)).encode()).hexdigest()


def _store(model: Any, tokenizer: Any, outcome: Outcome, folder: Path) -> None:
    save(model, tokenizer, folder / "model")
    stored = dataclasses.asdict(outcome)
    (folder / "outcome.json").write_text(
        json.dumps({key: stored[key] for key in ("metrics", "curves", "cost", "diverged", "notes")})
    )
