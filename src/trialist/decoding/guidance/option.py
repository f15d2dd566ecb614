"""Guided decoding: the next token is drawn from a product of what one model says in several contexts, or two models in one.

OPAD (principle-guided decoding), classifier-free guidance, context-aware decoding and contrastive decoding differ in names of
one strength and are one option here, `ContrastiveGuidance`. Sources: OPAD, arXiv 2502.14204; classifier-free guidance of language
models, arXiv 2306.17806; context-aware decoding, arXiv 2305.14739; contrastive decoding, arXiv 2210.15097 and 2309.09117.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, TopPLogitsWarper

from trialist.decoding.guidance.loop import around_guided
from trialist.decoding.guidance.rows import token_rows
from trialist.decoding.options import Slot, around_loop

REWARDS = ("token", "two_step", "official")
RECIPE = str(Path(__file__).parent / "recipe")
"""For `model.generate(..., custom_generate=RECIPE, trust_remote_code=True, contexts=..., strength=...)`"""

Contexts = Sequence[Sequence[Any]]
"""For each context the prompts in it, one a row of the batch: lists of token ids, or texts"""


@dataclass(frozen=True)
class ContrastiveGuidance:
    """Shifts every step of `generate` from what the model says to its prompt towards what it says in other contexts.

    With l_0 the next-token log-probabilities after the plain prompt, which is `input_ids`, and l_k those after context k (nats):

        D_t = sum over k of v_k (l_k - l_0)                          what the contexts change
        score_t = l_0 + D_t + s (D_t + ... + D_{t-w+1})              w: 1, or `window` with the two-step reward

    At s = 1/beta this is OPAD, at s = guidance_scale - 1 classifier-free guidance, at s = alpha context-aware decoding. s = 0 is
    exactly the model in the context (one context, weight 1). No contexts, weights of 0, and s = -1 with the token reward are
    exactly the model on the plain prompt: the arguments of `generate` are returned as they are. Scores are not normalised;
    temperature, top-p, and all other processors act on them as on logits.

    All contexts and the plain prompt are rows of one batch: a step costs one forward pass of (K + 1) B rows, of fewer where a
    coefficient is 0. The cache holds these rows and is not returned.

    contexts: K times B prompts, without what is generated: token ids, or texts, which are tokenised as they are and need
        `tokenizer=` among the arguments of `generate`. An empty one stands for the beginning of a text.
    strength: s, any number.
    weights: v_k, one for each context; None shares 1 among them. A negative one leads away from its context.
    reward: "token" looks at the current step only; "two_step" adds the log-ratios of the steps before, at the same candidates, as
        the paper's code does; "official" is that code with its errors (guides no first token, takes the mean of logits over the
        prompt for the step before the second), to compare with.
    window: steps that "two_step" adds up, the current one included.
    first_token: whether the first token is guided; if not, it comes from the contexts alone.
    mask_alpha: the candidates' probability in the contexts is at least this share of the largest one; 0 allows all. Guards
        against tokens that are improbable everywhere, whose ratio may be anything; does nothing where nothing is subtracted.
    mask_top_p: the candidates are those of the nucleus of this mass, likewise; 1 allows all.
    amateur: a model of the same vocabulary that says l_0 instead. Without contexts the model itself, on the plain prompt, takes
        their place: contrastive decoding.
    policy: share of l_0 + D_t in the score; 0 leaves the reward alone, which is contrastive decoding as first published.

    Raises ValueError for values out of range, and in `prepare` for what cannot be guided.
    """

    contexts: Contexts = ()
    strength: float = 1.0
    weights: Sequence[float] | None = None
    reward: Literal["token", "two_step", "official"] = "token"
    window: int = 2
    first_token: bool = True
    mask_alpha: float = 0.0
    mask_top_p: float = 1.0
    amateur: PreTrainedModel | None = None
    policy: float = 1.0
    slot: ClassVar[Slot] = "loop"

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength) or not math.isfinite(self.policy):
            raise ValueError(f"strength={self.strength}, policy={self.policy}: finite numbers")
        if self.reward not in REWARDS:
            raise ValueError(f"reward={self.reward!r}: one of {', '.join(REWARDS)}")
        if self.window < 1:
            raise ValueError(f"window={self.window}: steps, at least 1, which is the token reward")
        if not 0.0 <= self.mask_alpha <= 1.0 or not 0.0 < self.mask_top_p <= 1.0:
            raise ValueError(
                f"mask_alpha={self.mask_alpha} is in [0, 1], where 0 allows all; mask_top_p={self.mask_top_p} in (0, 1], "
                "where 1 allows all"
            )
        if self.weights is not None and len(self.weights) != len(self.contexts):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.contexts)} contexts; give one each, or leave them out"
            )
        if not all(map(math.isfinite, self.weights or ())):
            raise ValueError(f"weights={tuple(self.weights or ())}: finite numbers")
        if self.policy == 0 == self.strength:
            raise ValueError("policy=0 leaves the reward alone, and strength=0 leaves none: give a strength")
        if self.amateur is not None and max(self.values) <= 0:
            raise ValueError(
                "an amateur is what a context, or the plain prompt, is held against: at least one weight must be above 0, or "
                "leave contexts out"
            )

    @classmethod
    def opad(
        cls, contexts: Contexts, beta: float | None = 1.0, reward: Any = "two_step", **more: Any
    ) -> ContrastiveGuidance:
        """OPAD at inverse strength `beta`, above 0; None and infinity are the model in the context, without a reward."""
        if beta is not None and not beta > 0:
            raise ValueError(f"beta={beta}: above 0; small values guide strongly, None not at all")
        return cls(contexts, strength=0.0 if beta is None else 1 / beta, reward=reward, **more)

    @classmethod
    def classifier_free(cls, contexts: Contexts, guidance_scale: float, **more: Any) -> ContrastiveGuidance:
        """Classifier-free guidance; 1 is the model in the context, 0 the model on the plain prompt."""
        return cls(contexts, strength=guidance_scale - 1, **more)

    @classmethod
    def context_aware(cls, contexts: Contexts, alpha: float = 0.5, **more: Any) -> ContrastiveGuidance:
        """Context-aware decoding; `alpha` of 0 is the model in the context."""
        return cls(contexts, strength=alpha, **more)

    @classmethod
    def contrastive_decoding(
        cls, amateur: PreTrainedModel, alpha: float | None = None, mask_alpha: float = 0.1, **more: Any
    ) -> ContrastiveGuidance:
        """The model against an amateur, with the adaptive plausibility mask.

        alpha: None scores candidates by the log-ratio alone, as first published (arXiv 2210.15097); a number takes
            (1 + alpha) log-probabilities of the model minus alpha of the amateur's (arXiv 2309.09117), and 0 is the plain model.
        """
        if alpha is None:
            return cls(amateur=amateur, strength=1.0, policy=0.0, mask_alpha=mask_alpha, **more)
        return cls(amateur=amateur, strength=alpha, mask_alpha=mask_alpha, **more)

    @property
    def values(self) -> tuple[float, ...]:
        """v, one for each context; without contexts the one of the plain prompt against the amateur."""
        count = max(1, len(self.contexts))
        return (1 / count,) * count if self.weights is None else tuple(map(float, self.weights))

    @property
    def steps(self) -> int:
        """Steps whose log-ratios make up the reward."""
        return {"token": 1, "two_step": self.window, "official": 2}[self.reward]

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of the log-probabilities of this step: what is held against the contexts first, then the contexts."""
        total = round(math.fsum(self.values), 12)
        reference = round(self.policy * (1 - total) - self.strength * total, 12)
        return (reference, *((self.policy + self.strength) * v for v in self.values))

    @property
    def contrasts(self) -> bool:
        """Whether anything is subtracted, or added up over steps."""
        return min(self.coefficients) < 0 or self.policy != 1 or (self.steps > 1 and self.strength != 0)

    @property
    def needed(self) -> tuple[bool, ...]:
        """Whether the distribution is needed, in the order of `coefficients`."""
        if self.steps > 1 and self.strength != 0:
            return tuple(True for _ in self.coefficients)
        support = (False, *(self.contrasts and v > 0 for v in self.values))
        return tuple(c != 0 or kept for c, kept in zip(self.coefficients, support, strict=True))

    @property
    def neutral(self) -> bool:
        """Whether this is the model on its plain prompt."""
        if not self.contexts:
            return self.amateur is None or not (self.contrasts or self.needed[0])
        return self.amateur is None and self.needed == (True, *(False for _ in self.contexts))

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if self.neutral:
            return dict(generate_kwargs)
        rows = _checked(self, model, generate_kwargs)
        return around_loop(generate_kwargs, functools.partial(around_guided, self, rows))

    def combine(
        self, logits: Sequence[Tensor | None], past: Sequence[Tensor] = (), first: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of the next token `(B, V)`, and D `(B, V)`, None where no step needs it.

        logits: `(B, V)` each in the order of `coefficients`, None where not needed. past: D of the steps before.
        first: whether this is the first generated token.
        """
        only = [found for found in logits if found is not None]
        if len(only) == 1 and not self.contrasts:
            return only[0], None
        log_p = [None if found is None else found.float().log_softmax(-1) for found in logits]
        if not self.contrasts:
            return _mean(log_p, self.coefficients), None
        reference, *others = log_p
        if reference is None:  # its coefficient is 0
            change = None
            score = _mean(others, self.coefficients[1:])
        else:
            change = sum(
                v * _difference(x, reference) for v, x in zip(self.values, others, strict=True) if x is not None
            )
            assert isinstance(change, Tensor)
            guided = self.first_token and self.reward != "official"
            reward = sum(past, change) if guided or not first else 0.0
            policy = self.policy if guided or not first else 1.0
            score = policy * (_finite(reference) + change) + self.strength * reward
        return score.masked_fill(self._likely(log_p).isneginf(), -math.inf), change

    def _likely(self, log_p: Sequence[Tensor | None]) -> Tensor:
        """Log-probabilities in the contexts, -inf for what is impossible there or masked."""
        reference, *others = log_p
        positive = [(v, x) for v, x in zip(self.values, others, strict=True) if v > 0 and x is not None]
        if not positive:
            assert reference is not None
            mean = reference
        elif len(positive) == 1:
            mean = positive[0][1]
        else:
            mean = _mean([x for _, x in positive], [v for v, _ in positive]).log_softmax(-1)
        if self.mask_alpha > 0:
            least = mean.amax(-1, keepdim=True) + math.log(self.mask_alpha)
            mean = mean.masked_fill(mean < least, -math.inf)
        return mean if self.mask_top_p == 1 else TopPLogitsWarper(self.mask_top_p)(None, mean)


def _mean(log_p: Sequence[Tensor | None], coefficients: Sequence[float]) -> Tensor:
    """Weighted sum of those that are there; -inf stays."""
    found = sum(c * x for c, x in zip(coefficients, log_p, strict=True) if x is not None and c != 0)
    assert isinstance(found, Tensor)
    return found


def _finite(log_p: Tensor) -> Tensor:
    """Impossible tokens as probable as the least probable one that is not: a ratio to 0 says nothing of how much."""
    impossible = log_p.isneginf()
    least = log_p.masked_fill(impossible, math.inf).amin(-1, keepdim=True)
    return log_p.where(~impossible, least)


def _difference(log_p: Tensor, reference: Tensor) -> Tensor:
    """The log-ratio, 0 where both are impossible."""
    difference = _finite(log_p) - _finite(reference)
    return difference.masked_fill(log_p.isneginf() & reference.isneginf(), 0.0)


def _checked(
    option: ContrastiveGuidance, model: GenerationMixin, generate_kwargs: Mapping[str, Any]
) -> list[list[list[int]]]:
    """The contexts as token ids, a list for each, with a list for each row. Raises ValueError for what cannot be guided."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} reads prompts with an encoder; guidance needs a decoder-only model")
    if generate_kwargs.get("assistant_model") is not None:
        raise ValueError(
            "an assistant drafts without the contexts, and its drafts are checked in blocks against the model's own "
            "distribution, which guidance replaces; leave out assistant_model, or the guidance"
        )
    for name in ("inputs_embeds", "position_ids", "token_type_ids"):
        if generate_kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is given; under guidance the prompt is token ids, and positions follow from its mask"
            )
    prompt = generate_kwargs.get("input_ids")
    if prompt is None:
        raise ValueError("guidance needs the plain prompt as input_ids")
    if option.amateur is not None:
        theirs = option.amateur.config.get_text_config(decoder=True).vocab_size
        if theirs != text.vocab_size:
            raise ValueError(
                f"the amateur has a vocabulary of {theirs} tokens and the model one of {text.vocab_size}; tokens must mean the "
                "same to both"
            )
    rows = []
    for number, context in enumerate(option.contexts, start=1):
        if len(context) != len(prompt):
            raise ValueError(
                f"context {number} has {len(context)} rows and the batch has {len(prompt)}: one prompt in the context for each"
            )
        where = f"context {number}"
        rows.append(token_rows(context, where, text.vocab_size, generate_kwargs.get("tokenizer")))
    return rows
