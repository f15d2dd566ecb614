"""What the two ranks of test_parallel.py do; each writes what it saw to RANK.json in the folder given.

torchrun --nproc-per-node 2 -m tests.training.parallel_program FOLDER ddp,fsdp SECTION...
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from tests.training.conftest import VOCABULARY, tiny_llama
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.decoder import ModularDecoderForCausalLM
from trialist.models.peer.feed_forward import grow_experts
from trialist.objectives import CrossEntropy
from trialist.optimizers import adamw
from trialist.training import checkpoints, fit, parallel
from trialist.training.parallel import initialize_from_torchrun, local_part, shard_model

FAMILIES = ("llama", "tied, recomputed", "modular", "lora")
RATES = {"lora": 3e-2}


def make(family, **options):
    if family == "modular":
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        return ModularDecoderForCausalLM(ModularDecoderConfig(vocab_size=VOCABULARY, **sizes, **options))
    model = tiny_llama(tie_word_embeddings=family == "tied, recomputed", **options)
    if family == "tied, recomputed":
        model.gradient_checkpointing_enable()
    if family == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=3, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    return model


def batches(index):
    """Two packed documents a row; rows, lengths and the number of labels differ, one in seven batches has no label."""
    index %= 14
    generator = torch.Generator().manual_seed(1000 + index)
    rows, length = 1 + index % 3, 9 + index % 4
    input_ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, -1).clone()
    positions[:, 4:] -= 4
    labels = torch.where(positions == 0, -100, input_ids)
    labels[:, : index % 5] = -100
    if index % 7 == 3:
        labels[:] = -100
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels}


def evaluate(model):
    batch = batches(4)
    loss, stats = CrossEntropy()(model, batch)
    logits = model(batch["input_ids"]).logits
    return {"nats": float(loss / stats["weight"]), "square": float(logits.square().mean())}


TRAJECTORY = MappingProxyType({"schedule": "cosine", "evaluate": evaluate, "evaluate_every": 25})


class Norms(TrainerCallback):
    """The norm of the gradient of each step, before it is clipped."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs["grad_norm"])


def steps(family):
    return 20 if family == "lora" else 50


def train(kind, family="llama", *, steps=50, options=MappingProxyType({}), **given):
    model = make(family, **options)
    if kind == "fsdp":
        shard_model(model)
    optimizer = adamw(model, RATES.get(family, 3e-3))
    arguments = {"budget": {"steps": steps}, "accumulate": 3, "clip": 0.3, "seed": 11, **given}
    result = fit(model, arguments.pop("batches", batches), CrossEntropy(), optimizer, parallel=kind, **arguments)
    return model, optimizer, result


class Odd(nn.Module):
    """Weights of one row, a weight that is never used, one that every other batch uses, and a buffer.

    Sharded weights must be used alike on all ranks, so there no batch uses the last but one.
    """

    def __init__(self, irregular):
        super().__init__()
        self.irregular = irregular
        self.embedding = nn.Embedding(3, 5)
        self.score = nn.Linear(5, 1)
        self.sometimes = nn.Parameter(torch.ones(2))
        self.never = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, input_ids):
        return self.score(self.embedding(input_ids))[..., 0]


def odd_batches(index):
    generator = torch.Generator().manual_seed(index)
    return {"input_ids": torch.randint(3, (2, 1 + index % 3), generator=generator), "index": torch.tensor(index)}


def odd_objective(model, batch):
    values = (model(batch["input_ids"]) - 1).square()
    model.seen += 1 + int(batch["index"]) % 2  # differs between ranks
    loss = values.sum()
    if model.irregular and batch["index"] % 2:
        loss = loss + (model.sometimes * (1 + batch["index"] % 3)).square().sum()
    return loss, {"weight": values.numel()}


def train_odd(kind, irregular=False, **given):
    torch.manual_seed(0)
    model = Odd(irregular)
    if kind == "fsdp":
        shard_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    arguments = {
        "budget": {"steps": 6},
        "accumulate": 4,
        "divergence_margin": math.inf,
        "flops_per_token": 1.5,
        **given,
    }
    return model, optimizer, fit(model, odd_batches, odd_objective, optimizer, parallel=kind, **arguments)


def bits(model, optimizer, result):
    """Hashes of this rank's weights and optimizer state, and the losses as they are."""
    weights, state = hashlib.sha256(), hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(local_part(tensor).contiguous().numpy().tobytes())
    for tensors in optimizer.state.values():
        for name in sorted(tensors):
            state.update(local_part(tensors[name]).contiguous().numpy().tobytes())
    return [weights.hexdigest(), state.hexdigest(), list(result.losses), optimizer.param_groups[0]["lr"]]


def outcome(result):
    return {"losses": result.losses, "cost": result.cost, "curves": result.curves, "diverged": result.diverged}


def raised(call):
    """Kind and words of the error of `call`; None where it comes back."""
    try:
        call()
    except (ValueError, OSError) as error:
        return [type(error).__name__, str(error)]
    return None


def trajectories(kind, folder):
    for family in FAMILIES:
        norms = Norms()
        model, _, result = train(
            kind, family, **TRAJECTORY, steps=steps(family), checkpoint=folder / family, keep=1, callbacks=[norms]
        )
        parts = [local_part(parameter).numel() for parameter in model.parameters()]
        yield family, {**outcome(result), "held": sum(parts), "norms": norms.seen}


def odd(kind, folder):
    model, _, result = train_odd(kind, irregular=kind == "ddp")
    yield "losses", result.losses
    yield "seen", float(model.seen)
    weights = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in model.named_parameters()}
    yield "weights", {name: tensor.tolist() for name, tensor in weights.items()}
    whole = bits(*train_odd(kind))
    train_odd(kind, budget={"steps": 4}, checkpoint=folder / "odd")
    resumed = train_odd(kind, checkpoint=folder / "odd")
    yield "resumed", [resumed[2].resumed_at, bits(*resumed) == whole]


def resuming(kind, folder):
    given = {"family": "tied, recomputed", "options": {"attention_dropout": 0.2}, "steps": 9}
    given["schedule"] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    saving = {**given, "checkpoint": folder / "resumed", "checkpoint_every": 2}
    whole = bits(*train(kind, **given))
    train(kind, **{**saving, "steps": 4})
    resumed = train(kind, **saving)
    yield "from the newest", [resumed[2].resumed_at, bits(*resumed) == whole]
    yield "kept", sorted(path.name for path in (folder / "resumed").iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        newest = folder / "resumed" / "step-00000009"
        file = sorted(newest.iterdir())[1] if kind == "fsdp" else newest.with_suffix(".safetensors")
        os.truncate(file, file.stat().st_size // 2)
        shutil.copytree(folder / "resumed", folder / "damaged")
    dist.barrier()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed = train(kind, **saving)
    yield "from the one before", [resumed[2].resumed_at, bits(*resumed) == whole]
    yield "warnings", [str(warning.message) for warning in told if "damaged" in str(warning.message)]
    other = "ddp" if kind == "fsdp" else "fsdp"
    yield "other kind", raised(lambda: train(other, **saving))
    yield "another seed", bits(*train(kind, **given, seed=12)) == whole


def decisions(kind, folder):
    def slow(index):
        time.sleep(0.03 * dist.get_rank())
        return batches(index)

    per_step = [sum(batches(3 * step + place)["input_ids"].numel() for place in range(3)) for step in range(9)]
    yield "tokens", train(kind, budget={"tokens": sum(per_step[:4]) - 1})[2].cost
    seconds = train(kind, budget={"seconds": 0.4}, batches=slow)[2]
    yield "seconds", [seconds.steps, seconds.cost["seconds"]]

    drawn = {}

    def draws(index):
        drawn[index] = float(torch.rand(()))
        return batches(index)

    train(kind, steps=2, batches=draws)
    drawn.pop(0)  # drawn outside of a step, too, to look at the first batch
    train(kind, steps=2, batches=draws)
    yield "draws", drawn

    def spoilt(model, batch):
        loss, stats = CrossEntropy()(model, batch)
        return (loss * math.nan if torch.equal(batch["labels"], batches(7)["labels"]) else loss), stats

    model = make("llama")
    if kind == "fsdp":
        shard_model(model)
    optimizer = adamw(model, 1e-3)
    result = fit(model, batches, spoilt, optimizer, budget={"steps": 5}, accumulate=3, parallel=kind)
    yield "diverged", [result.diverged, bool(all(local_part(p).isfinite().all() for p in model.parameters()))]

    class Listener(TrainerCallback):
        def __init__(self):
            self.heard = []

        def on_step_end(self, args, state, control, **kwargs):
            self.heard.append([state.global_step, state.is_world_process_zero, state.is_local_process_zero])
            if dist.get_rank() == 1:
                control.should_evaluate = state.global_step == 2
                control.should_training_stop = state.global_step == 3

    listener, told = Listener(), []
    result = train(
        kind, steps=9, evaluate=lambda model: {"rank": dist.get_rank()}, callbacks=[listener],
        progress=lambda *given: told.append(given),
    )[2]  # fmt: skip
    yield "callbacks", [listener.heard, result.curves["rank"], len(told) > 0]


def errors(kind, folder):
    yield "accumulate", raised(lambda: train(kind, steps=2, accumulate=1))
    yield "seed", raised(lambda: train(kind, steps=2, seed=dist.get_rank()))
    model = make("llama")
    optimizer = adamw(model, 1e-3)
    if kind == "fsdp":
        shard_model(model)
        yield "optimizer", raised(lambda: fit(model, batches, CrossEntropy(), optimizer, accumulate=2, parallel="fsdp"))
        yield "twice", raised(lambda: shard_model(model))
        yield "alone", raised(lambda: fit(model, batches, CrossEntropy(), adamw(model, 1e-3)))
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
        yield "wrapped", raised(lambda: fit(wrapped, batches, CrossEntropy(), optimizer, accumulate=2, parallel="ddp"))
        yield "whole", raised(lambda: fit(model, batches, CrossEntropy(), optimizer, accumulate=2, parallel="fsdp"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    train(kind, steps=2, checkpoint=folder / "full")
    whole, shards = checkpoints.save_file, safetensors.torch.save
    if kind == "ddp" and dist.get_rank() == 0:
        checkpoints.save_file = full
    if kind == "fsdp" and dist.get_rank() == 1:
        safetensors.torch.save = full
    yield "full disk", raised(lambda: train(kind, steps=4, checkpoint=folder / "full"))
    checkpoints.save_file, safetensors.torch.save = whole, shards
    dist.barrier()
    yield "left", sorted(path.name for path in (folder / "full").iterdir())


class Kill(TrainerCallback):
    """Ends rank 1 without a word as step 7 of the first attempt begins: step 4 is the last checkpoint then."""

    def __init__(self, mark):
        self.mark = mark

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6 and dist.get_rank() == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def killed(kind, folder):
    given = {"steps": 12, "schedule": "cosine", "options": {"attention_dropout": 0.2}}
    saving = {"checkpoint": folder / "killed", "checkpoint_every": 4, "callbacks": [Kill(folder / "mark")]}
    resumed = train(kind, **given, **saving)
    yield "resumed", [resumed[2].resumed_at, bits(*resumed) == bits(*train(kind, **given))]


def expert_decoder(query_norm="batchnorm", prepare=None):
    """The last feed-forward is a PEER layer; `prepare` changes the model before it is trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 49, "num_heads": 2, "top_k": 3, "key_dim": 6, "query_norm": query_norm}
    model = ModularDecoderForCausalLM(
        ModularDecoderConfig(vocab_size=VOCABULARY, ffn_types=["swiglu", "peer"], peer=experts, **sizes)
    )
    if prepare is not None:
        prepare(model)
    return model


def freeze_and_grow(model):
    model.model.layers[1].ffn.freeze("experts+keys")
    grow_experts(model, 9, torch.Generator().manual_seed(1))


EXPERTS = {
    "batchnorm": expert_decoder,
    "frozen and grown": functools.partial(expert_decoder, prepare=freeze_and_grow),
    "sync_batchnorm": functools.partial(expert_decoder, "sync_batchnorm"),
}


def train_experts(kind, build, data=batches, accumulate=4):
    """Losses, what the running statistics of the queries came to, and whether what was frozen is as it was."""
    model = build()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if kind == "fsdp":
        shard_model(model)
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    result = fit(
        model, data, CrossEntropy(), adamw(model, 3e-3), "cosine", {"steps": 10}, accumulate=accumulate, parallel=kind
    )
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    kept = [torch.equal(a, b) for a, b, still in zip(before, whole, frozen, strict=True) if still]
    statistics = dict(model.named_buffers())["model.layers.1.ffn.query_norm.running_var"]
    return {"losses": result.losses, "statistics": statistics.tolist(), "kept": kept}


def pairs(index):
    """The micro-batches 2 i and 2 i + 1 of `equal_batches` as one: what two ranks see together."""
    first, second = equal_batches(2 * index), equal_batches(2 * index + 1)
    return {name: torch.cat([first[name], second[name]]) for name in first}


def equal_batches(index):
    generator = torch.Generator().manual_seed(index)
    input_ids = torch.randint(VOCABULARY, (2, 9), generator=generator)
    return {"input_ids": input_ids, "labels": input_ids}


def experts(kind, folder):
    for name, build in EXPERTS.items():
        if name == "sync_batchnorm":
            yield name, train_experts(kind, build, equal_batches)
            yield "uneven", raised(lambda: train_experts(kind, EXPERTS["sync_batchnorm"], accumulate=3))
        else:
            yield name, train_experts(kind, build)
    if kind == "ddp":  # torch's own wrapper
        wrapped = nn.parallel.DistributedDataParallel(EXPERTS["frozen and grown"]())
        batch = equal_batches(dist.get_rank())
        for _ in range(2):  # a second pass fails where a parameter got no gradient in the first
            wrapped.zero_grad()
            wrapped(**batch).loss.backward()
        yield "gradients", [None if p.grad is None else p.grad.tolist() for p in wrapped.module.parameters()]


SECTIONS = {section.__name__: section for section in (trajectories, odd, resuming, decisions, errors, experts, killed)}


def main(folder, kinds, *names):
    initialize_from_torchrun()
    parallel.BUCKET = 10_000  # so that there are several
    found = {}
    for kind in kinds.split(","):
        (Path(folder) / kind).mkdir(exist_ok=True)
        for name in names:
            found |= {f"{kind}/{name}/{key}": value for key, value in SECTIONS[name](kind, Path(folder) / kind)}
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
