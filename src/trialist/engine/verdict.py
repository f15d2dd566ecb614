"""The verdict: reads the runs of a trial once and decides in a fixed order, by rules older than the runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trialist.engine.advice import More, advice, what_decides
from trialist.engine.checks import (
    below_floor,
    different_items,
    excess_divergence,
    missing_runs,
    roles,
    small_samples,
    unequal_budget,
)
from trialist.engine.contract import Arm, Endpoint, Replicate, Trial
from trialist.engine.contrasts import Contrast, contrast, grid_contrast
from trialist.engine.effects import fitted_metric, kind_of, label_of
from trialist.engine.intervals import FIXED, Level
from trialist.engine.records import Effect, RunRecord, Verdict, primary_setting
from trialist.engine.rules import Decision, Evidence, null_word, word_for
from trialist.engine.savings import cost_equivalent, cost_ratio, saving_contrast
from trialist.engine.sentences import effect_words, reason, sentence, signed_words
from trialist.engine.sequential import Look, level_of
from trialist.engine.table import Table


def decide(
    trial: Trial,
    arms: Sequence[Arm],
    runs: Iterable[RunRecord],
    *,
    margin: float | None = None,
    endpoint: Endpoint | None = None,
    replicate: Replicate | None = None,
    look: Look | None = None,
    tuning_equal: bool = True,
    tuning_note: str = "",
    substitutes: Sequence[str] = (),
    expected: Iterable[tuple[str, str, int]] | None = None,
) -> Verdict:
    """The verdict over the runs that are there.

    margin, endpoint, replicate: replace those of the claim. look: the design under which the trial is looked at early.
    substitutes: remarks on metrics or settings that the inputs replaced. expected: (arm, setting, seed) of every run
    that belongs to the verdict; by default every arm with every seed seen in its setting.
    Raises ValueError for arms that cannot be decided, and for an endpoint without a margin.
    """
    return _Trial(
        trial,
        list(arms),
        list(runs),
        margin,
        endpoint,
        replicate,
        look,
        tuning_equal,
        tuning_note,
        substitutes,
        expected,
    ).verdict()


@dataclass
class _Trial:
    """One decision: the inputs, and the steps in order."""

    trial: Trial
    arms: list[Arm]
    runs: list[RunRecord]
    margin: float | None
    endpoint: Endpoint | None
    given_replicate: Replicate | None
    look: Look | None
    tuning_equal: bool
    tuning_note: str
    substitutes: Sequence[str]
    expected: Iterable[tuple[str, str, int]] | None

    def __post_init__(self) -> None:
        claim = self.trial.claim
        self.replicate: Replicate = self.given_replicate or self.trial.replicates_over()
        self.level: Level = level_of(self.look) if self.replicate in ("seed", "seed x item") else FIXED
        self.main = self.endpoint or claim.endpoint
        if self.margin is not None:
            self.main = replace(self.main, margin=self.margin)
        if self.main.margin is None:
            raise ValueError(f"endpoint {self.main.name!r} decides, so it needs a margin: --margin VALUE")
        self.replaced = self.endpoint is not None and self.endpoint.name != claim.endpoint.name
        self.co_primary = tuple(entry for entry in claim.co_primary if entry.name != self.main.name)
        self.guards = tuple(entry for entry in claim.guards if entry.name != self.main.name)
        self.setting = primary_setting(self.arms)
        self.controls, self.named, self.references, self.factors = roles(self.arms, self.setting)
        self.effect: Any = self.trial.effect
        if isinstance(self.effect, staticmethod):
            self.effect = self.effect.__func__
        self.grid = self.effect is not None and kind_of(self.effect) != "paired"
        if self.grid and (self.guards or claim.kind == "non-inferiority"):
            raise ValueError(
                f"{label_of(self.effect)} is fitted over all arms, so the claim can have no guards and no saving"
            )
        if not self.grid and (self.named is None or not self.controls):
            raise ValueError(f"setting {self.setting!r} needs one treatment and at least one control")
        self.treatment = self.named or ""
        self.deciding = [*self.controls, *([self.named] if self.named else []), *self.factors]
        self.table = Table(self.arms, self.runs)
        self.names = [entry.name for entry in (self.main, *claim.endpoints)]

    def verdict(self) -> Verdict:
        claim, table = self.trial.claim, self.table
        fatal, other = missing_runs(table, self._expected(), self.setting, self.deciding)
        evidence = self._evidence()
        decision = self._with_and_without(evidence)
        null_effects, shown = self._null_settings()
        void = self._void(fatal, shown)
        main = evidence.endpoints[0]
        strongest = min(main, key=lambda e: (e.interval.estimate is not None, e.interval.estimate or 0.0)).control
        ratios = {} if self.grid else cost_ratio(table, self.setting, strongest, self.treatment, claim.price)
        more = () if void or decision.word != "inconclusive" else self._more(decision, evidence)
        readings = [
            (getattr(effect, "said", False), self._fitted(effect, self.setting, replace(self.main, margin=None)))
            for effect in self.trial.readings()
        ]
        aloud = [entry for told, entry in readings if told]
        said = self._said(decision, evidence, void, more, ratios, strongest, aloud)
        return Verdict(
            word="void" if void else decision.word,
            reason=said[0],
            sentence=said[1],
            advice=said[2],
            trial=type(self.trial).__name__,
            treatment=self.treatment or label_of(self.effect),
            setting=self.setting,
            effects=tuple(entry.effect() for entry in main),
            co_primary=tuple(entry.effect() for group in evidence.endpoints[1:] for entry in group),
            guards=tuple(entry.effect() for entry in evidence.guarding),
            secondary=tuple(
                e.effect() for entry in claim.secondary for e in self._against(entry, self.setting, secondary=True)
            ),
            readings=tuple(entry.effect() for _, entry in readings),
            settings=tuple(e.effect() for name in self._settings(null=False) for e in self._against(self.main, name)),
            null_effects=null_effects,
            references=self._references(),
            savings=tuple(entry.effect() for entry in evidence.savings),
            threats=tuple(dict.fromkeys(self._threats(decision, evidence, other, null_effects))),
            divergences={arm: table.divergences(self.setting, arm) for arm in [*self.deciding, *self.references]},
            cost_ratio=ratios,
            cost_equivalent=None
            if self.grid
            else cost_equivalent(
                table, self.setting, strongest, self.treatment, self.main, self.trial.budget.unit_of(self.setting)
            ),
            more_seeds=next((entry.count for entry in more if entry.unit == "seeds"), None),
        )

    def _against(
        self, endpoint: Endpoint, setting: str, arms: Sequence[str] | None = None, secondary: bool = False
    ) -> tuple[Contrast, ...]:
        """Contrasts of one endpoint in one setting, one per control (or the one effect over all arms)."""
        if self.grid:
            if secondary and fitted_metric(self.effect, endpoint.name) != endpoint.name:
                return ()  # it is fitted to a metric of its own, whatever the endpoint
            return (self._fitted(self.effect, setting, endpoint),)
        controls, treatment, _, _ = roles(self.arms, setting)
        if treatment is None:
            return ()
        paired = None if secondary else self.effect
        return tuple(
            contrast(self.table, setting, arm, treatment, endpoint, self.replicate, self.level, paired, self.names)
            for arm in (arms if arms is not None else controls)
        )

    def _fitted(self, effect: Any, setting: str, endpoint: Endpoint) -> Contrast:
        return grid_contrast(self.table, setting, endpoint, effect, self.level, self.names)

    def _evidence(self) -> Evidence:
        saving = self.trial.claim.saving
        savings: tuple[Contrast, ...] = ()
        excess = ""
        if not self.grid:
            excess = excess_divergence(self.table, self.setting, self.controls, self.treatment)
            if saving is not None:
                savings = tuple(
                    saving_contrast(self.table, self.setting, arm, self.treatment, saving, self.replicate, self.level)
                    for arm in self.controls
                )
        return Evidence(
            endpoints=tuple(self._against(entry, self.setting) for entry in (self.main, *self.co_primary)),
            guards=tuple(self._against(entry, self.setting, secondary=True) for entry in self.guards),
            savings=savings,
            non_inferiority=self.trial.claim.kind == "non-inferiority",
            least_saving=saving.least if saving else 0.0,
            excess_divergence=excess,
            level=self.level,
        )

    def _with_and_without(self, evidence: Evidence) -> Decision:
        """The word; where it depends on how diverged runs are counted, `inconclusive`."""
        decision, without = word_for(evidence), evidence.without_diverged()
        if without is None:
            return decision
        other = word_for(without)
        if other.word == decision.word:
            return decision
        first = evidence.endpoints[0][0]
        why = f"`{decision.word}` with diverged runs counted as the worst value, `{other.word}` without them"
        return Decision("inconclusive", undecided=((first, why), *decision.undecided))

    def _void(self, fatal: list[str], null_shown: list[str]) -> str:
        """Why the comparison does not count; empty where it does."""
        table, endpoints = self.table, (self.main, *self.co_primary, *self.guards)
        if not table.in_setting(self.setting) and not fatal:
            return "no run has finished"
        if not self.grid:
            budget = unequal_budget(table, self.setting, self.controls, self.treatment, self.trial.budget)
            if budget:
                return budget
        if not self.tuning_equal:
            return "unequal tuning" + (f": {self.tuning_note}" if self.tuning_note else "")
        if items := different_items(table, self.setting, self.deciding, endpoints):
            return items
        if fatal:
            more = f" and {len(fatal) - 3} more" if len(fatal) > 3 else ""
            return f"{len(fatal)} run{'s are' if len(fatal) > 1 else ' is'} missing: {', '.join(fatal[:3])}{more}"
        if floor := below_floor(table, self.setting, self.controls, endpoints):
            return floor
        if null_shown:
            return f"the negative control shows the effect at the size of the margin: {'; '.join(null_shown)}"
        return ""

    def _null_settings(self) -> tuple[tuple[Effect, ...], list[str]]:
        effects, shown = [], []
        for setting in self._settings(null=True):
            found = self._against(self.main, setting)
            word = null_word(found)
            effects += [replace(entry.effect(), null_word=word) for entry in found]
            if word == "effect shown":
                words = (
                    effect_words(found, "", True)
                    if self.grid
                    else f"{signed_words(found[0])} against {found[0].control}"
                )
                shown.append(f"in setting {setting}, {words}")
        return tuple(effects), shown

    def _settings(self, null: bool) -> list[str]:
        return list(dict.fromkeys(arm.setting for arm in self.arms if arm.null == null and arm.setting != self.setting))

    def _references(self) -> tuple[Effect, ...]:
        if self.grid or not self.references:
            return ()
        with_runs = [arm for arm in self.references if self.table.of(self.setting, arm)]
        return tuple(entry.effect() for entry in self._against(self.main, self.setting, with_runs))

    def _more(self, decision: Decision, evidence: Evidence) -> tuple[More, ...]:
        diverged = evidence.without_diverged() is not None and not decision.too_few
        if diverged and (evidence.excess_divergence or len({word_for(e).word for e in _both(evidence)}) > 1):
            return ()
        return what_decides(
            decision, evidence, self.replicate, self.table, self.grid and kind_of(self.effect) == "models"
        )

    def _said(
        self,
        decision: Decision,
        evidence: Evidence,
        void: str,
        more: Sequence[More],
        ratios: dict[str, float],
        strongest: str,
        aloud: Sequence[Contrast],
    ) -> tuple[str, str, str]:
        if void:
            return void, f"the comparison does not count: {void}.", f"Put this right and run again: {void}."
        trained = self.replicate in ("seed", "seed x item")
        said = sentence(decision, evidence, self.treatment, self.replicate, trained, self.grid)
        notes = (
            [f"the claim's own endpoint {_words(self.trial.claim.endpoint.name)} was replaced"] if self.replaced else []
        )
        decisive = {_words(entry.name) for entry in (self.trial.claim.endpoint, *self.co_primary, *self.guards)}
        notes += [effect_words([entry], "", factor=True) for entry in aloud if not decision.too_few]
        notes += [note for note in self.substitutes if any(name in _words(note) for name in decisive)]
        if notes:
            said = f"{said[:-1]} ({'; '.join(note.rstrip('.') for note in notes)})."
        return (
            reason(decision, evidence),
            said,
            advice(decision, evidence, self.treatment, self.grid, ratios, more, strongest, self.trial.claim.price),
        )

    def _threats(
        self, decision: Decision, evidence: Evidence, missing: list[str], null_effects: Sequence[Effect]
    ) -> Iterable[str]:
        main = evidence.endpoints[0][0]
        if missing:
            yield f"comparisons are missing or incomplete: {', '.join(missing[:5])}" + (
                " and more" if len(missing) > 5 else ""
            )
        yield from small_samples(main.items, main.interval.n, self.replicate, main.repeated)
        for arm in self.deciding:
            if count := self.table.divergences(self.setting, arm):
                of = len(self.table.of(self.setting, arm))
                yield f"{arm} diverged in {count} of {of} runs; they count as the worst value"
        for setting in [*self._settings(null=False), *self._settings(null=True)]:
            controls, treatment, _, _ = roles(self.arms, setting)
            if treatment and not self.grid:
                if budget := unequal_budget(self.table, setting, controls, treatment, self.trial.budget):
                    yield f"setting {setting}: {budget}"
                if items := different_items(self.table, setting, [*controls, treatment], [self.main]):
                    yield f"setting {setting}: {items}"
        for entry in null_effects:
            if entry.null_word == "undecided":
                yield f"the negative control {entry.setting} is undecided against {entry.control}" + (
                    f": {entry.reason}" if entry.reason else ""
                )
        if self.trial.budget.tolerance and self.trial.budget.reason:
            yield f"budgets may differ by {100 * self.trial.budget.tolerance:g} %: {self.trial.budget.reason}"
        if self.replaced:
            own = _words(self.trial.claim.endpoint.name)
            yield f"the claim's own endpoint {own} was replaced by {_words(self.main.name)}"
        if self.tuning_equal and self.tuning_note:
            yield f"tuning: {self.tuning_note}"
        yield from self.substitutes

    def _expected(self) -> list[tuple[str, str, int]]:
        if self.expected is not None:
            return list(self.expected)
        wanted = []
        for arm in self.arms:
            here = {run.seed for run in self.runs if run.setting == arm.setting and run.purpose == "trial"}
            wanted += [(arm.name, arm.setting, seed) for seed in sorted(here)]
        return wanted


def _both(evidence: Evidence) -> list[Evidence]:
    without = evidence.without_diverged()
    return [evidence] if without is None else [evidence, without]


def _words(text: str) -> str:
    return text.replace("_", " ")
