"""What a trial may measure instead of the paired difference: ratios, interactions, slopes and associations.

A trial sets one of them, `effect = interaction("task", "log_ratio", given=("total_lr_time",))`. A name in an effect is
looked up in a run's metrics, then in its covariates, then in its arm's options. What is fitted comes on the endpoint's scale
of analysis. Positive must mean better once the endpoint's direction is applied: the effect of a lower-is-better endpoint is
turned around by the engine.

An effect is a callable with a `kind` and a `label`. It may have `per`, what one unit of it is counted by (`doubling`), or a
`unit` of its own where it is no change of the endpoint; and `said`, for a reading that belongs into the verdict's sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import stats

from trialist.engine.contract import Arm, Endpoint, Outcome
from trialist.engine.intervals import FIXED, Array, Interval, Level, Undefined, to_scale, undefined
from trialist.engine.item_intervals import bca

LEAST_MODELS = 8
"""Models (and clusters of models) below which an association gives no interval"""
_RESAMPLES = 1_999
_PERMUTATIONS = 9_999


@dataclass(frozen=True)
class Cell:
    """One run as an effect sees it."""

    arm: Arm
    seed: int
    outcome: Outcome

    def lookup(self, name: str) -> Any:
        """Metric, covariate or arm option of that name. Raises Undefined where there is none or it has no value."""
        if name in self.outcome.undefined:
            raise Undefined(f"{name} is undefined in {self.arm.name}, seed {self.seed}: {self.outcome.undefined[name]}")
        for source in (self.outcome.metrics, self.outcome.covariates, self.arm.options):
            if name in source:
                return source[name]
        raise Undefined(f"{self.arm.name}, seed {self.seed} has no metric, covariate or option {name!r}")

    def value(self, name: str) -> float:
        found = self.lookup(name)
        if isinstance(found, str) or not np.isfinite(found):
            raise Undefined(f"{name} is {found!r} in {self.arm.name}, seed {self.seed}: a finite number is needed")
        return float(found)


@dataclass(frozen=True)
class Ratio:
    """Treatment over control, minus one: the relative change of an endpoint that is positive."""

    kind: ClassVar[str] = "paired"
    label: ClassVar[str] = "relative change"

    def __call__(self, control: float, treatment: float) -> float:
        if control <= 0 or treatment <= 0:
            raise Undefined(f"a ratio needs positive values, not {treatment:g} over {control:g}")
        return treatment / control - 1.0


@dataclass(frozen=True)
class Interaction:
    """Coefficient of first x second in a least-squares fit over the cells of one seed, given covariates."""

    first: str
    second: str
    given: tuple[str, ...] = ()
    metric: str | None = None
    """What is fitted; default: the claim's endpoint"""

    kind: ClassVar[str] = "replicate"

    @property
    def label(self) -> str:
        return f"interaction of {self.first} and {self.second}" + _conditions(self.given)

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        a, b = _coded(cells, self.first), _coded(cells, self.second)
        columns = [a, b, *([cell.value(name) for cell in cells] for name in self.given), a * b]
        return _last_coefficient(columns, [cell.value(self.metric or endpoint) for cell in cells], self.label)


@dataclass(frozen=True)
class Slope:
    """Least-squares slope of y on x over the cells of one seed, given covariates."""

    x: str
    y: str | None = None
    """Default: the claim's endpoint"""
    given: tuple[str, ...] = ()

    kind: ClassVar[str] = "replicate"

    @property
    def label(self) -> str:
        return f"slope over {self.x}" + _conditions(self.given)

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        columns = [[cell.value(name) for cell in cells] for name in (*self.given, self.x)]
        return _last_coefficient(columns, [cell.value(self.y or endpoint) for cell in cells], self.label)


@dataclass(frozen=True)
class Association:
    """Correlation of x and y over models, given covariates; positive is better, so claim the sign with `better`."""

    x: str
    y: str
    given: tuple[str, ...] = ()
    cluster: str = ""
    """`seed`, or the name of an option or covariate (such as `family`), whose models are not independent"""
    method: Literal["spearman", "pearson"] = "spearman"

    kind: ClassVar[str] = "models"

    @property
    def label(self) -> str:
        return f"association of {self.x} and {self.y}" + _conditions(self.given)

    def interval(self, cells: Sequence[Cell], sign: float = 1.0, level: Level = FIXED) -> Interval:
        return _over_models(self, (self,), cells, sign, level)

    def statistic(self, table: Array) -> float:
        """Partial correlation; table (models, 2 + covariates): x, y, given."""
        x, y = self._residuals(table)
        norm = float(np.sqrt((x @ x) * (y @ y)))
        return float("nan") if norm < 1e-12 else float(x @ y) / norm

    def table(self, cells: Sequence[Cell]) -> Array:
        return np.array([[cell.value(name) for name in (self.x, self.y, *self.given)] for cell in cells])

    def _residuals(self, table: Array) -> tuple[Array, Array]:
        if self.method == "spearman":
            table = stats.rankdata(table, axis=0)
        table = table - table.mean(axis=0)
        table = table / np.maximum(np.sqrt((table**2).sum(axis=0)), 1e-300)
        if not self.given:
            return table[:, 0], table[:, 1]
        fit = np.linalg.lstsq(table[:, 2:], table[:, :2], rcond=None)[0]
        left = table[:, :2] - table[:, 2:] @ fit
        return left[:, 0], left[:, 1]


@dataclass(frozen=True)
class DifferenceOfAssociations:
    """How much stronger the first association is than the second, over the same models."""

    first: Association
    second: Association

    kind: ClassVar[str] = "models"

    @property
    def label(self) -> str:
        return f"{self.first.label} minus {self.second.label}"

    def interval(self, cells: Sequence[Cell], sign: float = 1.0, level: Level = FIXED) -> Interval:
        if self.first.cluster != self.second.cluster:
            raise ValueError("difference_of_associations: both must be clustered alike")
        return _over_models(self, (self.first, self.second), cells, sign, level)


def ratio() -> Ratio:
    return Ratio()


def interaction(first: str, second: str, *, given: tuple[str, ...] = (), metric: str | None = None) -> Interaction:
    return Interaction(first, second, given, metric)


def slope(x: str, y: str | None = None, *, given: tuple[str, ...] = ()) -> Slope:
    return Slope(x, y, given)


def association(
    x: str,
    y: str,
    *,
    given: tuple[str, ...] = (),
    cluster: str = "",
    method: Literal["spearman", "pearson"] = "spearman",
) -> Association:
    return Association(x, y, given, cluster, method)


def difference_of_associations(first: Association, second: Association) -> DifferenceOfAssociations:
    return DifferenceOfAssociations(first, second)


def kind_of(effect: Any) -> str:
    """`paired` (control, treatment) -> number, `replicate` (cells of a seed, endpoint) -> number, or `models`."""
    return getattr(effect, "kind", "replicate")


def label_of(effect: Any) -> str:
    return getattr(effect, "label", None) or getattr(effect, "__name__", "effect").replace("_", " ")


def fitted_metric(effect: Any, endpoint: str) -> str:
    """The metric that an effect over arms is fitted to: its own, or the endpoint."""
    return getattr(effect, "metric", None) or getattr(effect, "y", None) or endpoint


def per_of(effect: Any) -> str:
    """`doubling` for an effect that is counted by it; empty where it has no such unit."""
    return getattr(effect, "per", "")


def unit_of(effect: Any, endpoint: Endpoint) -> str:
    """In what an effect is given: its own unit, or that of the endpoint on its scale of analysis."""
    own = getattr(effect, "unit", "")
    return own or endpoint.analysed_unit + (f" per {per_of(effect)}" if per_of(effect) else "")


def with_metric(cell: Cell, name: str, value: float) -> Cell:
    """The cell with one metric replaced (a diverged run counts as the worst value of its setting)."""
    reasons = {key: reason for key, reason in cell.outcome.undefined.items() if key != name}
    metrics = {**cell.outcome.metrics, name: value}
    return replace(cell, outcome=replace(cell.outcome, metrics=metrics, undefined=reasons))


def on_scale(cell: Cell, name: str, scale: str) -> Cell:
    """The cell with one metric on its scale of analysis. Raises Undefined where it has no value there."""
    if scale == "identity" or name not in cell.outcome.metrics:
        return cell
    return with_metric(cell, name, float(to_scale(cell.outcome.metrics[name], scale, f"{name} of {cell.arm.name}")))


def _over_models(
    effect: Association | DifferenceOfAssociations,
    associations: tuple[Association, ...],
    cells: Sequence[Cell],
    sign: float,
    level: Level,
) -> Interval:
    """BCa over clusters of models, and a permutation p value."""
    clusters = [_cluster(cell, associations[0].cluster, index) for index, cell in enumerate(cells)]
    members = [np.flatnonzero(labels) for labels in (np.array(clusters) == name for name in sorted(set(clusters)))]
    n, over = (
        len(members),
        "models" if not associations[0].cluster else f"clusters of models by {associations[0].cluster}",
    )
    method = f"BCa over {n} {over}, permutation p"
    if n < LEAST_MODELS:
        return undefined(f"{n} {over}: an association needs at least {LEAST_MODELS}", n, method, level=level)
    tables = [entry.table(cells) for entry in associations]

    def statistic(rows: Array | slice) -> float:
        values = [entry.statistic(table[rows]) for entry, table in zip(associations, tables)]
        return sign * (values[0] - values[1] if len(values) == 2 else values[0])

    estimate = statistic(slice(None))
    if not np.isfinite(estimate):
        return undefined("x or y does not vary over the models", n, method, level=level)
    generator = np.random.default_rng(n)
    drawn = generator.integers(0, n, size=(_RESAMPLES, n))
    resamples = np.array([statistic(np.concatenate([members[g] for g in row])) for row in drawn])
    left_out = np.array([statistic(np.concatenate(members[:g] + members[g + 1 :])) for g in range(n)])
    resamples = resamples[np.isfinite(resamples)]
    if len(resamples) < _RESAMPLES // 2 or not np.isfinite(left_out).all():
        return undefined("x or y hardly varies over the models", n, method, estimate, level)
    degenerate = undefined("the association does not vary when models are left out", n, method, estimate, level)
    interval = bca(estimate, resamples, left_out, n, method, degenerate)
    if not interval.defined:
        return interval
    spread = float(resamples.std(ddof=1))
    p_better, p_worse = _permuted(associations, tables, members, estimate, sign, generator)
    return replace(interval, standard_error=spread, p_better=p_better, p_worse=p_worse)


def _permuted(
    associations: tuple[Association, ...],
    tables: list[Array],
    members: list[Any],
    estimate: float,
    sign: float,
    generator: np.random.Generator,
) -> tuple[float, float]:
    """One-sided p values of no association: y's residuals permuted, or whole clusters' products turned."""
    parts = [entry._residuals(table) for entry, table in zip(associations, tables)]
    norms = [float(np.sqrt((x @ x) * (y @ y))) for x, y in parts]
    products = sum(
        sign * weight * x * y / norm for weight, (x, y), norm in zip((1.0, -1.0), parts, norms)
    )  # (models,), sums to the estimate
    if len(parts) == 2 or any(len(rows) > 1 for rows in members):
        by_cluster = np.array([float(np.asarray(products)[rows].sum()) for rows in members])
        null = generator.choice([-1.0, 1.0], size=(_PERMUTATIONS, len(members))) @ by_cluster
    else:
        x, y = parts[0]
        shuffled = generator.permuted(np.broadcast_to(y, (_PERMUTATIONS, len(y))), axis=1)
        null = sign * (shuffled @ x) / norms[0]
    tolerance = 1e-12
    above = (1 + int((null >= estimate - tolerance).sum())) / (_PERMUTATIONS + 1)
    below = (1 + int((null <= estimate + tolerance).sum())) / (_PERMUTATIONS + 1)
    return above, below


def _cluster(cell: Cell, name: str, index: int) -> str:
    if not name:
        return f"{index:09d}"
    return str(cell.seed) if name == "seed" else str(cell.lookup(name))


def _coded(cells: Sequence[Cell], name: str) -> Array:
    """Numbers as they are; two named levels as 0 (declared first) and 1."""
    values = [cell.lookup(name) for cell in cells]
    if not any(isinstance(value, str) for value in values):
        return np.array([cell.value(name) for cell in cells])
    levels = list(dict.fromkeys(values))
    if len(levels) != 2:
        raise Undefined(f"factor {name} has {len(levels)} named levels ({', '.join(map(str, levels))}); 2 are needed")
    return np.array([float(levels.index(value)) for value in values])


def _last_coefficient(columns: Sequence[Any], y: Sequence[float], label: str) -> float:
    """Least squares with an intercept; the coefficient of the last column, if the cells determine it."""
    design = np.stack([np.ones(len(y)), *(np.asarray(column, dtype=np.float64) for column in columns)], axis=1)
    scales = np.maximum(np.abs(design).max(axis=0), 1e-300)
    coefficients, _, rank, _ = np.linalg.lstsq(design / scales, np.asarray(y, dtype=np.float64), rcond=None)
    if rank < design.shape[1]:
        raise Undefined(f"{label}: {len(y)} cells do not determine {design.shape[1]} coefficients")
    return float(coefficients[-1] / scales[-1])


def _conditions(given: tuple[str, ...]) -> str:
    return f" given {', '.join(given)}" if given else ""


ReplicateEffect = Callable[[Sequence[Cell], str], float]
