"""What a trial declares: claim, arms, endpoint, budget, tuning, and what one run hands back.

Everything here is a plain frozen dataclass. A trial module imports this file and nothing heavy at its top, so that
`trialist list`, `show` and `--help` stay instant; torch and the other rooms are imported inside `run`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from trialist.engine.context import Context

Better = Literal["higher", "lower"]
Replicate = Literal["seed", "seed x item", "item", "model"]
Role = Literal["control", "treatment", "reference", "factor"]
COST_UNITS = (
    "tokens",
    "steps",
    "flops",
    "seconds",
    "generated_tokens",
    "verifier_calls",
    "sequence_forwards",
    "bytes",
    "bits",
)

ANALYSED_UNITS = {"log": "log ratio", "logit": "log odds"}
"""Scale of analysis -> unit of differences on it; on `identity` that is the unit of the endpoint"""
OVER = "_by_"
"""Between a reading and what it is read over, in the name of a curve that does not lie over the budget"""


@dataclass(frozen=True)
class Endpoint:
    """A metric that decides (or guards): its direction, its unit and the smallest effect worth having."""

    name: str
    """Key of the value in `Outcome.metrics`"""
    unit: str = ""
    better: Better = "higher"
    margin: float | None = None
    """Smallest effect worth having, > 0, on the analysed scale (`scale`); for a guard, the largest loss accepted"""
    scale: Literal["identity", "log", "logit"] = "identity"
    """Scale of analysis: differences are taken after this transform (`log` for skewed positive metrics, `logit` for rates)"""
    floor: float | None = None
    """Raw value that every control must reach on average (in the direction `better`); below it the trial is void"""
    needs: str = ""
    """What the data must hold for this metric, e.g. `gold`; named in `--help` and in the verdict when it is replaced"""

    def __post_init__(self) -> None:
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"endpoint {self.name!r}: margin must be > 0, not {self.margin}")

    @property
    def analysed_unit(self) -> str:
        """Unit of differences on the scale of analysis."""
        return ANALYSED_UNITS.get(self.scale, self.unit)


@dataclass(frozen=True)
class Saving:
    """What a non-inferiority claim saves: 1 - treatment / control of a cost unit or endpoint, in the same runs."""

    name: str
    """A cost unit, a measured cost (`wall_seconds`, `cpu_seconds`, `peak_bytes`) or a metric of the outcome"""
    least: float
    """Least relative saving worth having, in (0, 1)"""

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise ValueError(f"saving {self.name!r}: least must lie in (0, 1), not {self.least}")


@dataclass(frozen=True)
class Claim:
    """What the paper says, in our own words."""

    statement: str
    source: str
    """For example `arXiv:2410.02703`"""
    reported: str
    """The numbers that the paper reports"""
    endpoint: Endpoint
    co_primary: tuple[Endpoint, ...] = ()
    """Further endpoints that must all hold for `supported`"""
    guards: tuple[Endpoint, ...] = ()
    """Metrics that must not get worse by more than their margin"""
    secondary: tuple[Endpoint, ...] = ()
    """Reported with intervals, never decide"""
    kind: Literal["superiority", "non-inferiority"] = "superiority"
    saving: Saving | None = None
    price: str = ""
    """Name of a secondary endpoint that each use of the technique pays, where the costs of a run are mostly of training"""

    def __post_init__(self) -> None:
        if self.kind == "non-inferiority" and self.saving is None:
            raise ValueError("a non-inferiority claim names its saving: Claim(..., saving=Saving(name, least))")
        for endpoint in (self.endpoint, *self.co_primary, *self.guards):
            if endpoint.margin is None:
                raise ValueError(f"endpoint {endpoint.name!r} decides, so it needs a margin")
        if self.price and self.price not in {endpoint.name for endpoint in self.secondary}:
            raise ValueError(f"the price {self.price!r} must be one of the secondary endpoints")
        names = [endpoint.name for endpoint in self.endpoints]
        if len(set(names)) != len(names):
            raise ValueError(f"endpoint names clash: {names}")

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (self.endpoint, *self.co_primary, *self.guards, *self.secondary)


@dataclass(frozen=True)
class Budget:
    """What is held equal over the arms of a setting; measured by each run, not nominal."""

    unit: str
    tolerance: float = 0.0
    """Relative slack: a control may get up to this share less than the treatment before the trial is void"""
    reason: str = ""
    """Why the tolerance is wider than 0 (discrete units)"""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings whose binding unit differs from `unit`"""

    def __post_init__(self) -> None:
        for unit in (self.unit, *self.settings.values()):
            if unit not in COST_UNITS:
                raise ValueError(f"budget unit {unit!r} is unknown; one of {', '.join(COST_UNITS)}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"budget tolerance must lie in [0, 1), not {self.tolerance}")

    def unit_of(self, setting: str) -> str:
        return self.settings.get(setting, self.unit)


@dataclass(frozen=True)
class Tuning:
    """Hyper-parameter search before the trial: same number of tries for every arm, own metric, own seeds."""

    tries: int
    metric: Endpoint
    """On data that are not those of the verdict"""
    seeds: tuple[int, ...] = (1001, 1002)


@dataclass(frozen=True)
class Arm:
    """One arm in one setting. `options` (and, once tuned, the chosen values) are what `Trial.run` reads: `arm["gamma"]`."""

    name: str
    role: Role
    setting: str = "main"
    null: bool = False
    """Marks a negative control: in this setting the benefit must vanish"""
    primary: bool = False
    """Marks the setting that decides; by default the first non-null one declared"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Scalars or frozen dataclasses of scalars"""
    tune: Mapping[str, tuple] | None = None
    """Knob -> values to try; the product of all knobs must have `Tuning.tries` points"""
    tuned_as: str | None = None
    """Instead of `tune`: the arm whose chosen values it takes, as where several arms read one trained model"""
    about: str = ""
    """One line for `trialist show`"""

    def __getitem__(self, option: str) -> Any:
        if option not in self.options:
            raise KeyError(f"arm {self.name!r} has no option {option!r}; it has {', '.join(self.options) or 'none'}")
        return self.options[option]

    def with_options(self, **options: Any) -> Arm:
        return dataclasses.replace(self, options={**self.options, **options})


@dataclass(frozen=True)
class Cost:
    """What a run consumed, in the units that it has. Wall time, CPU time and resident peak are measured outside."""

    tokens: float | None = None
    steps: float | None = None
    flops: float | None = None
    seconds: float | None = None
    generated_tokens: float | None = None
    verifier_calls: float | None = None
    sequence_forwards: float | None = None
    bytes: float | None = None
    bits: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Items:
    """Scores of one metric per item (prompt, document), for `item` and `seed x item` replicates."""

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    clusters: tuple[str, ...] | None = None
    """Items of one cluster (a document, a prompt) are not independent; by default every item is its own"""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.scores) or (self.clusters is not None and len(self.clusters) != len(self.ids)):
            raise ValueError("Items: ids, scores and clusters must be of equal length")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("Items: ids must be unique")


@dataclass(frozen=True)
class Outcome:
    """What one run measured."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Endpoint name -> value"""
    items: Mapping[str, Items] = field(default_factory=dict)
    """Endpoint name -> score per item"""
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Metric name -> points (budget spent, value); the points of a name that ends in `_by_X` lie over X instead"""
    cost: Cost = field(default_factory=Cost)
    diverged: str | None = None
    """Why and at which step the run diverged; an outcome, not a failure"""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """Metric name -> why it has no value in this run"""
    notes: tuple[str, ...] = ()
    """One-line remarks for the report's threats section"""
    covariates: Mapping[str, float] = field(default_factory=dict)
    """Measured quantities that effects over grids or models condition on"""


@dataclass(frozen=True)
class Trial(ABC):
    """A controlled experiment that tests one claim. Subclasses are frozen dataclasses whose fields are the inputs."""

    claim: ClassVar[Claim]
    budget: ClassVar[Budget]
    replicate: ClassVar[Replicate] = "seed"
    tuning: ClassVar[Tuning | None] = None
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Preset name -> field values; the keys `seeds` and `about` are read by the engine"""
    version: ClassVar[int] = 1
    """Part of every run's identity: raise it when the meaning of a run changes"""
    preload: ClassVar[tuple[str, ...]] = ()
    """Modules that the worker server imports once (no tensor operation happens there)"""
    versions: ClassVar[tuple[str, ...]] = ()
    """Packages whose major version is part of a run's identity"""
    usage: ClassVar[str] = ""
    """How to use the part alone: a few lines of Python for `trialist show`"""
    silence_minutes: ClassVar[float] = 60.0
    """A run that reports no progress for this long is stopped and recorded as a time-out"""
    effect: ClassVar[Any] = None
    """A function of `trialist.engine.effects` that replaces the paired difference (grids, slopes, associations)"""

    @abstractmethod
    def arms(self) -> Iterator[Arm]:
        """What is compared, for these inputs."""

    @abstractmethod
    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        """One arm in one setting with one seed: a pure function, its randomness from `context.stream` only."""

    def check(self) -> None:  # noqa: B027 - most inputs need no check
        """Raises ValueError or FileNotFoundError for inputs that cannot work, before anything is started."""

    def digests(self) -> Mapping[str, str]:
        """Field name -> digest of the content it names (files, models); replaces the field's value in identities."""
        return {}

    def remarks(self) -> tuple[str, ...]:
        """One-line remarks on what these inputs change: arms left out, settings replaced, metrics substituted."""
        return ()

    def replicates_over(self) -> Replicate:
        """What the verdict generalises over for these inputs."""
        return self.replicate

    def readings(self) -> tuple[Any, ...]:
        """Further effects over the arms of the deciding setting (`trialist.engine.effects`): shown, never decide."""
        return ()

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The metrics of the runs whose direction is known."""
        return self.claim.endpoints

    def sources(self) -> tuple[str, ...]:
        """Further modules whose source decides what a run measures: those that an input names, as no import tells them."""
        return ()

    def with_benchmark(self, name: str) -> tuple[Trial, Endpoint]:
        """This trial with the models of its runs measured on benchmark `name` (`lm-eval:hellaswag`), and that endpoint.

        Trials whose runs have a model to hand over override this.
        """
        known = ", ".join(endpoint.name for endpoint in self.claim.endpoints)
        raise ValueError(
            f"--endpoint {name}: the runs of this trial hand over no model that a benchmark could measure; it takes {known}"
        )
