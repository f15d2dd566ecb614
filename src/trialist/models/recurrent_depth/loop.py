"""Recurrent depth (Huginn, arXiv 2502.05171): one core of layers, run as often as wanted between a prelude and a coda.

    e   = P(x)                               prelude, l_P layers
    s_0 ~ N(0, std^2), cut off at 3 std
    s_i = R(e, s_(i-1)),  i = 1..r           core: W [s; e] (or s + e), then l_R layers, the same at every step
    y   = C(n_c(s_r))                        coda, l_C layers; n_c, the final norm, stands again before the head

In training r is drawn anew for each pass, and only the last k steps have gradients. In evaluation r is fixed, or each token
stops by a criterion of its own.

Departures: s_0 is a function of (seed, position among the real tokens, channel), so that cached, padded and repeated passes
agree; training passes also key it by pass and row. `num_steps=r` in training keeps the gradient of the last min(r, k) steps;
the official code then has none. Labels are shifted once, as everywhere in transformers.

B batch, T time, d hidden size, r steps, k steps with gradient
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from trialist.models.configuration import ModularDecoderConfig
from trialist.models.decoder import DecoderBlock
from trialist.models.recurrent_depth.cache import RecurrentDepthCache
from trialist.models.recurrent_depth.exit import ExitPass, require_dynamic
from trialist.models.recurrent_depth.sampling import counter_normal, expected_steps, sample_recurrence
from trialist.models.recurrent_depth.settings import (
    CALL_OPTIONS,
    LATENT,
    RecurrentSettings,
    check_exit,
    check_speculation,
    effective_depth,
    layer_counts,
    settings_of,
    split_steps,
)

if TYPE_CHECKING:
    from trialist.models.deterministic import Scoring


class RecurrentDepth(nn.Module):
    """The depth `recurrent` of the modular decoder: `prelude`, `core` and `coda` blocks, and `adapter` W (d, 2d).

    Call options, arguments of `forward` and `generate`: `num_steps` (an int, or a pair of steps without and with gradient),
    `kv_slots`, `exit_criterion`, `exit_threshold`, `min_steps`, `check_every`, `warm_start`; see `RecurrentSettings`.
    `output_latent_states=True` adds s_0 to s_r to the output, which always tells the steps that each token ran.
    Of the options in a call, None switches `exit_criterion` and `kv_slots` off, and for the others says nothing.
    """

    call_options = (*CALL_OPTIONS, "output_latent_states")
    scoring_arguments = {"exit_criterion": None}
    """Log-probabilities of a text are those of all steps, unless somebody asks for others"""
    reads_head = True
    trains_without_cache = True
    """A training pass of random depth leaves nothing that a later pass could go on from"""

    def __init__(self, config: ModularDecoderConfig) -> None:
        super().__init__()
        self.config = config
        prelude, core, _ = layer_counts(config)
        settings = settings_of(config)
        blocks = [DecoderBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.prelude = nn.ModuleList(blocks[:prelude])
        self.core = Core(config, settings, blocks[prelude : prelude + core])
        self.coda = nn.ModuleList(blocks[prelude + core :])
        self.pinned = False
        """Whether calls cannot change the settings: a draft model is called with the options of the model it drafts for"""
        self.scoring: Scoring | None = None
        """Set by `deterministic_scoring`"""
        self.by_step = False
        """Whether a callback sets `passes`; otherwise training passes count themselves"""
        self.register_buffer(
            "passes", torch.zeros((), dtype=torch.long)
        )  # in checkpoints, so that r goes on after a resume

    def draw_initial_weights(self) -> None:
        init.zeros_(self.passes)

    @staticmethod
    def draw_weights_of(module: nn.Module, config: ModularDecoderConfig) -> None:
        """The paper's initial weights of one module, where the configuration asks for them."""
        if settings_of(config).initialization != "takase" or not isinstance(module, nn.Linear | nn.Embedding):
            return
        std = config.linear_std
        if getattr(module, "is_residual_output", False):
            std /= math.sqrt(2 * effective_depth(config))
        init.trunc_normal_(module.weight, mean=0.0, std=std, a=-3 * std, b=3 * std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            init.zeros_(module.weight[module.padding_idx])

    # a graph break around the loop, whose length varies; the core and the blocks inside are compiled
    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        x: Tensor,
        norm: nn.Module,
        head: nn.Module | None = None,
        *,
        past_key_values: Cache | None = None,
        output_latent_states: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """States before the final norm `(B, T, d)`; `num_steps` `(B, T)` and, on demand, `latent_states`.

        norm: the final norm, which also stands after the loop. head: for exit criteria that read distributions.
        """
        options = {name: kwargs.pop(name) for name in CALL_OPTIONS if name in kwargs}
        checkpointed = self.training and any(block.gradient_checkpointing for block in self.core.blocks)
        if checkpointed:
            past_key_values = None  # as transformers does, and says, in each checkpointed layer
        settings, (without, with_gradient), index = self._plan(options, past_key_values)
        steps = without + with_gradient
        if settings.exit_criterion is not None:
            self._require_exits(settings, head, checkpointed, kwargs)
        cache = None
        if past_key_values is not None:
            cache = RecurrentDepthCache.upgrade(past_key_values, self.config, steps, settings.kv_slots)
            cache.require(steps)
            _require_same_rows(cache, len(x))
            if settings.exit_criterion is not None:
                require_dynamic(cache, settings.exit_criterion)
        if index is not None and torch.is_grad_enabled() and not self.by_step:
            self.passes += 1

        padding_mask = kwargs.get("padding_mask")
        scale = settings.embedding_scale
        if scale is not None:
            x = x * (math.sqrt(self.config.hidden_size) if scale == "sqrt_width" else scale)
        outer = None if cache is None else cache.view(0)
        for block in self.prelude:
            x = block(x, past_key_values=outer, **kwargs)
        state = self._first_state(x, settings, cache, index, kwargs["position_ids"], padding_mask)
        states = [state]
        keep = states.append if output_latent_states else None

        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if padding_mask is None else padding_mask
        if settings.exit_criterion is not None:
            state, taken = self._exit_pass(x, settings, steps, cache, norm, head, kwargs)(state, real, keep)
        else:
            for step in range(steps):
                with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without):
                    if cache is not None and step >= cache.slots:
                        cache.take_back(step, x.shape[1])
                    view = None if cache is None else cache.view(step)
                    state = self.core(state, x, past_key_values=view, **kwargs)
                if keep is not None:
                    keep(state)
            if cache is not None and steps < cache.slots:
                cache.fill(steps, x.shape[1])
            taken = real.long() * steps

        if cache is not None:
            cache.note(taken, state[:, -1:].detach() if settings.warm_start else None)
        y = self._through_coda(state, norm, settings, past_key_values=outer, **kwargs)
        return y, {"num_steps": taken, "latent_states": tuple(states) if output_latent_states else None}

    def _through_coda(self, state: Tensor, norm: nn.Module, settings: RecurrentSettings, **kwargs: Any) -> Tensor:
        y = norm(state) if settings.core_norm else state
        for block in self.coda:
            y = block(y, **kwargs)
        return y

    @torch.compiler.disable
    def _plan(
        self, options: Mapping[str, Any], cache: Cache | None
    ) -> tuple[RecurrentSettings, tuple[int, int], int | None]:
        """Settings of this call, steps without and with gradient, and the index of the training pass (None outside)."""
        options = {} if self.pinned else dict(options)
        draws = self.training and cache is None and self.scoring is None
        trained = self.training and torch.is_grad_enabled()
        if trained and options.get("exit_criterion") is not None:
            raise ValueError("exit_criterion belongs to evaluation: a pass that is trained runs all its steps")
        if trained or draws or self.scoring is not None:
            options.setdefault("exit_criterion", None)
        num_steps = options.pop("num_steps", None)
        if num_steps is None and self.scoring is not None:
            num_steps = self.scoring.num_steps
        settings = settings_of(self.config, options)
        index = int(self.passes) if draws else None
        if index is not None and num_steps is None:
            num_steps = sample_recurrence(
                settings.seed, index, settings.mean_recurrence, settings.recurrence_sigma, settings.train_recurrence
            )
            _require_same_on_all_ranks(num_steps)
        split = split_steps(settings.steps if num_steps is None else num_steps, settings.backprop_depth)
        if settings.exit_criterion is not None:
            check_exit(settings, self.config, sum(split))
        if settings.kv_slots is not None and settings.kv_slots > sum(split):
            warnings.warn(
                f"kv_slots is {settings.kv_slots}, more than the {sum(split)} steps that use them", stacklevel=4
            )
        return settings, split, index

    def _require_exits(
        self, settings: RecurrentSettings, head: nn.Module | None, checkpointed: bool, arguments: Mapping[str, Any]
    ) -> None:
        """Raises ValueError for a pass in which no token can exit by itself."""
        if checkpointed:
            raise ValueError(
                "exit_criterion holds keys and values, which layers under gradient checkpointing cannot; switch it off "
                "while generating"
            )
        if settings.exit_criterion not in LATENT and head is None:
            raise ValueError(
                f"exit_criterion={settings.exit_criterion!r} reads next-token distributions and there is no language-model "
                "head in this pass; use 'latent_diff' or 'cosine', or call the model with its head"
            )
        for name, instead in (("output_hidden_states", "; take output_latent_states"), ("output_attentions", "")):
            if arguments.get(name, getattr(self.config, name, False)):
                raise ValueError(
                    f"{name} with exit_criterion={settings.exit_criterion!r}: the layers see fewer rows at each step, and those "
                    f"of the coda also in between{instead}, or give exit_criterion=None"
                )

    @torch.compiler.disable
    def _first_state(
        self,
        e: Tensor,
        settings: RecurrentSettings,
        cache: RecurrentDepthCache | None,
        index: int | None,
        position_ids: Tensor,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """s_0 `(B, T, d)`: noise, zeros, or at a warm start the last state of the token before."""
        B, T, d = e.shape
        offset, waiting = position_ids[:, :1], None  # (B | 1, 1): position of the first real token
        if padding_mask is not None:
            offset = position_ids.expand(B, T).gather(1, padding_mask.int().argmax(1, keepdim=True))
        if cache is not None:
            if cache.num_steps is not None and cache.offset is not None:
                waiting = (cache.num_steps == 0).all(1, keepdim=True)  # rows that have had nothing but padding so far
                offset = torch.where(waiting, offset, cache.offset)
            cache.offset = offset.expand(B, 1)
        if settings.state_init == "zero":
            s0 = torch.zeros_like(e)
        else:
            rows, key = None, (settings.seed, -1)
            if index is not None:
                rows, key = torch.arange(B, device=e.device)[:, None], (settings.seed, index)
            noise = counter_normal(key, position_ids - offset, d, settings.s0_std(), rows).to(e.dtype)
            s0 = noise.expand(B, T, d).contiguous()  # strides of later states, which compiled code is made for
        if (
            settings.warm_start
            and T == 1
            and waiting is not None
            and cache is not None
            and cache.last_state is not None
        ):
            return torch.where(waiting[..., None], s0, cache.last_state.to(e.dtype))
        return s0

    def _exit_pass(
        self,
        e: Tensor,
        settings: RecurrentSettings,
        steps: int,
        cache: RecurrentDepthCache | None,
        norm: nn.Module,
        head: nn.Module | None,
        arguments: dict[str, Any],
    ) -> ExitPass:
        def select(rows: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
            return (e, arguments) if rows is None else (e[rows], _select(arguments, rows, len(e)))

        def step(state: Tensor, inputs: tuple[Tensor, dict[str, Any]], view: Cache) -> Tensor:
            return self.core(state, inputs[0], past_key_values=view, **inputs[1])

        def logits(state: Tensor, inputs: tuple[Tensor, dict[str, Any]], view: Cache | None) -> Tensor:
            assert head is not None
            return head(norm(self._through_coda(state, norm, settings, past_key_values=view, **inputs[1])))

        return ExitPass(settings, steps, cache, select, step, logits)

    def prepare_cache(self, cache: Cache, options: Mapping[str, Any], *, speculates: bool = False) -> None:
        """Arranges an empty cache for the steps of a generation, and checks its options before it starts.

        speculates: whether drafted tokens are checked several at once.
        """
        settings, split, _ = self._plan({name: options[name] for name in CALL_OPTIONS if name in options}, cache)
        if speculates:
            check_speculation(settings, self.config, sum(split))
        RecurrentDepthCache.upgrade(cache, self.config, sum(split), settings.kv_slots).require(sum(split))


class Core(nn.Module):
    """One step R(e, s): injection of e into the state, then the core's blocks."""

    def __init__(self, config: ModularDecoderConfig, settings: RecurrentSettings, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.adapter = None
        if settings.injection == "concat":
            self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(blocks)

    @property
    def runs_per_pass(self) -> int:
        """How often a pass in evaluation runs this module."""
        return settings_of(self.config).steps

    @property
    def training_runs(self) -> float:
        """Expected runs of a training pass, in runs with a backward pass, which cost three times one without."""
        settings = settings_of(self.config)
        steps, trained = expected_steps(
            settings.mean_recurrence, settings.recurrence_sigma, settings.train_recurrence, settings.backprop_depth
        )
        return trained + (steps - trained) / 3

    def forward(self, state: Tensor, e: Tensor, **kwargs: Any) -> Tensor:
        """s_i `(B, T, d)` from s_(i-1) and e, both `(B, T, d)`."""
        x = state + e if self.adapter is None else self.adapter(torch.cat([state, e], dim=-1))
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


def _require_same_rows(cache: RecurrentDepthCache, rows: int) -> None:
    """The rows of a warm start are those whose states the cache holds."""
    if cache.last_state is not None and len(cache.last_state) != rows:
        raise ValueError(
            f"warm_start: the cache holds the states of {len(cache.last_state)} rows and {rows} rows are decoded; keep the rows, "
            "or select them in the cache with batch_select_indices"
        )


def _select(arguments: Mapping[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """The arguments of the blocks for some rows of the batch."""

    def select(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(select(part) for part in value)
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch:
            return value.index_select(0, rows.to(value.device))
        return value

    return {name: select(value) for name, value in arguments.items()}


def _require_same_on_all_ranks(steps: int) -> None:
    """Under TORCH_DISTRIBUTED_DEBUG, raises ValueError where ranks drew different numbers of steps."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_debug_level() == torch.distributed.DebugLevel.OFF:
        return
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, steps)
    if len(set(everywhere)) > 1:
        raise ValueError(
            f"the ranks drew {everywhere} steps for one training pass; use RecurrenceCallback, or start all ranks from one "
            "checkpoint and let them make equally many passes"
        )
