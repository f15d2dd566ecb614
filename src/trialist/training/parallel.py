"""Several processes that train one model: their shares of the data, the sums over them, and sharded weights.

W ranks take turns at the micro-batches of a step: rank r computes those whose place in the step is r modulo W. An
optimizer step over W ranks therefore sees exactly the micro-batches, each of them whole, that it sees on one process.
Cutting every micro-batch by rows instead would split pairs of a preference batch and change objectives that look at all
rows of a batch.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

KINDS = ("ddp", "fsdp")
BUCKET = 2**25
"""Bytes of gradients that are added up in one exchange"""


def initialize_from_torchrun() -> torch.device:
    """Joins the processes that `torchrun` started and returns the device of this one: its own GPU, or the CPU.

    Raises ValueError outside of torchrun, or when it started more processes than there are GPUs.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set in the environment: start this script by "
            "`torchrun --standalone --nproc-per-node 2 ...`"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started local rank {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; "
                "give --nproc-per-node at most that"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return device


class Ranks:
    """The processes that train `model` together. Without a kind: a process on its own, for which nothing is exchanged.

    Raises ValueError where kind, model and process group do not fit each other.
    """

    def __init__(self, kind: str | None = None, model: nn.Module | None = None) -> None:
        self.kind, self.rank, self.size, self.local_rank = kind, 0, 1, 0
        self.root: Any = getattr(model, "_root_of_shards", None)
        self.versions: list[int] = []
        if kind is not None and kind not in KINDS:
            raise ValueError(f"parallel is {kind!r}; choose from {KINDS}, or None for a process on its own")
        if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"model is wrapped in {type(model).__name__}; give the model itself and parallel='ddp', or shard it "
                "with trialist.training.parallel.shard_model and give parallel='fsdp'"
            )
        if kind != "fsdp" and self.root is not None:
            raise ValueError(f"the weights of the model are sharded: give parallel='fsdp', not {kind!r}")
        if kind is None:
            return
        if not dist.is_initialized():
            raise ValueError(
                f"parallel={kind!r} needs several processes: start the script by torchrun and call "
                "trialist.training.parallel.initialize_from_torchrun() first"
            )
        if kind == "fsdp" and self.root is None:
            raise ValueError(
                "parallel='fsdp' needs a model that trialist.training.parallel.shard_model has sharded, and an "
                "optimizer made after that"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.host: Any = _host_group(dist.group.WORLD)

    @property
    def first(self) -> bool:
        """Whether this is the rank that reports and writes."""
        return self.rank == 0

    @property
    def described(self) -> str:
        return f"{self.kind} on {self.size} ranks"

    def start_alike(self, model: nn.Module) -> None:
        """Gives every rank the weights of the first; sharded ones have been given out by `shard_model`."""
        if self.kind == "ddp":
            for tensor in (*model.parameters(), *model.buffers()):
                _copy_from_first(tensor)

    def share(self, indices: range) -> Iterator[tuple[int, bool]]:
        """The micro-batches of a step that this rank computes, and whether each counts.

        Where they do not divide by the ranks, a rank is left without one in the last round. Sharded weights need all
        ranks in every pass, so there it computes the first one of that round along, at weight 0.
        """
        for start in range(0, len(indices), self.size):
            place = start + self.rank
            if place < len(indices):
                yield indices[place], True
            elif self.kind == "fsdp":
                yield indices[start], False

    def run(self, model: nn.Module, function: Callable[..., Any], *given: Any) -> Any:
        """`function(model, *given)`, with sharded weights gathered while it lasts."""
        return function(model, *given) if self.root is None else self.root(function, *given)

    def reshard(self) -> None:
        """Frees weights that a pass without backward has left gathered."""
        if self.root is not None:
            self.root.reshard()

    def add_up(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], sums: Tensor, costs: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """`sums` and `costs` over all ranks; leaves the sum of the gradients over all ranks in `parameters`.

        A parameter without a gradient on any rank stays without one, as on one process. Buffers that a rank has
        written to become those of the first rank.
        """
        buffers = list(model.buffers())
        versions = [buffer._version for buffer in buffers]
        changed = self.versions != versions
        present = [parameter.grad is not None for parameter in parameters]
        told = torch.tensor([*costs.values(), changed, *present], dtype=torch.float64)
        dist.all_reduce(told, group=self.host)  # on the host: no wait for the accelerator
        amounts = told.tolist()
        if amounts[len(costs)]:
            for buffer in buffers:
                _copy_from_first(buffer)
            self.versions = [buffer._version for buffer in buffers]
        if self.kind == "ddp":
            somewhere = [p for p, count in zip(parameters, amounts[len(costs) + 1 :], strict=True) if count]
            for parameter in somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            _add_gradients([parameter.grad for parameter in somewhere if parameter.grad is not None])
        dist.all_reduce(sums)
        return sums, dict(zip(costs, amounts))

    def total_norm(self, gradients: Sequence[Tensor], device: torch.device) -> Tensor:
        """Norm over all of `gradients`, which are this rank's shards of them where the weights are sharded."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.kind != "fsdp":
            return norm
        square = norm.to(device, torch.float64).square()
        dist.all_reduce(square)
        return square.sqrt()

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set on any rank."""
        if self.kind is None:
            return list(flags)
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.host)
        return [bool(flag) for flag in told.tolist()]

    def number_of_first(self, number: float) -> float:
        if self.kind is None:
            return number
        told = torch.tensor([number], dtype=torch.float64)
        dist.broadcast(told, 0, group=self.host)
        return float(told)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank; all ranks wait here for each other."""
        if self.kind is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """An OSError of one rank inside the block is raised on all of them, so that none waits for it in vain."""
        error: OSError | None = None
        try:
            yield
        except OSError as raised:
            if self.kind is None:
                raise
            error = raised
        if self.kind is None:
            return
        told = self.gather(None if error is None else (error.errno, error.strerror or str(error)))
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                raise OSError(failure[0], f"rank {rank}: {failure[1]}")

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError, on all ranks, when one was started with other settings or data than the first."""
        first, *others = self.gather(dict(settings))
        for rank, other in enumerate(others, start=1):
            differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            if differing:
                words = "; ".join(f"{key}: {first.get(key)!r} on rank 0, {other.get(key)!r}" for key in differing)
                raise ValueError(f"rank {rank} was started with other settings ({words}); all ranks need the same call")


ALONE = Ranks()


class _Root(nn.Module):
    """Calls a function of the model as its forward pass.

    FSDP gathers weights when the forward pass of the module begins that holds them. Embedding, final norm and head are
    held by this module, so an objective may call parts of the model, or read the weight of the head, in any order and
    as often as its data needs: the exchanges are the same on all ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *given: Any) -> Any:
        return function(self.model, *given)


def shard_model(model: nn.Module, layers: Sequence[nn.Module] | None = None) -> nn.Module:
    """Shards the weights of `model` over all ranks, in place, by FSDP2; they are gathered layer by layer as they are used.

    Call it with the model on its device and before the optimizer is made, then `fit(model, ..., parallel="fsdp")`. The
    ranks start from the weights of rank 0. Outside of `fit` the model no longer computes; `consolidate` turns its
    checkpoint into a whole model.

    layers: the modules gathered one at a time; None: those that the model's class names in `_no_split_modules`, or the
        whole model at once.
    Raises ValueError without a process group, and for a model that has no weights yet or is sharded already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not dist.is_initialized():
        raise ValueError("shard_model needs several processes: call initialize_from_torchrun() under torchrun first")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("the model is sharded already; give shard_model the plain model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: load its weights before shard_model")
    for tensor in (*model.parameters(), *model.buffers()):
        _copy_from_first(tensor)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in reversed(_layers(model) if layers is None else list(layers)):  # inner ones first
        fully_shard(layer, mesh=mesh)
    root = fully_shard(_Root(model), mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum over ranks; the division by the total weight comes later
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    object.__setattr__(model, "_root_of_shards", root)  # not as a submodule: the root holds the model
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked so that a run on one process need not import them."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """The shard of this rank, sharing memory; the tensor itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def _layers(model: nn.Module) -> list[nn.Module]:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT wrapper
    names = set(getattr(inner, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


@lru_cache(maxsize=1)
def _host_group(world: Any) -> Any:
    """The ranks as seen from the CPU, for numbers that the host needs."""
    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@torch.no_grad()
def _copy_from_first(tensor: Tensor) -> None:
    whole = local_part(tensor.detach()).contiguous()
    raw = whole.reshape(-1).view(torch.uint8)  # as bytes: gloo does not know every dtype
    dist.broadcast(raw, 0)
    if dist.get_rank() != 0:
        tensor.copy_(raw.view(whole.dtype).view(whole.shape))


@torch.no_grad()
def _add_gradients(gradients: Sequence[Tensor]) -> None:
    """Adds gradients up over ranks in place, in buckets; while one is exchanged the next is put together.

    It begins after the last backward pass, not inside it: a weight that is used several times (tied, looped or
    recomputed) has its gradient only at the end.
    """
    sent: list[tuple[list[Tensor], Tensor, Any]] = []

    def receive() -> None:
        bucket, flat, work = sent.pop(0)
        work.wait()
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket)])

    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(sent) > 1:
            receive()
    while sent:
        receive()


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        size = 0
        for gradient in gradients:
            if gradient.dtype != dtype:
                continue
            if bucket and size + gradient.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket
