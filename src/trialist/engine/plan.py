"""From a trial's name and options to the list of runs: inputs, arms, seeds, identities. Nothing is run here."""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.engine.contract import Arm, Better, Endpoint, Trial
from trialist.engine.home import home_folder
from trialist.engine.identity import digest, inputs_by_content, inputs_of, run_identity, source_digest
from trialist.engine.options import RunOptions
from trialist.engine.records import Configuration, PlannedRun, primary_setting, settings_of
from trialist.engine.registry import load_path, load_trial, trial_paths
from trialist.engine.worker import Task

RESERVED = ("seeds", "about")
TIME_UNITS = ("seconds", "wall_seconds", "cpu_seconds", "s", "ms", "tokens/s", "steps/s")


@dataclass(frozen=True)
class Prepared:
    """A trial with its inputs, arms and seeds settled."""

    name: str
    path: str
    trial: Trial
    preset: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    options: RunOptions
    endpoint: Endpoint | None
    """Replaces the claim's endpoint"""
    inputs: Mapping[str, Any]
    """By content"""
    changed: tuple[str, ...]
    """Fields that differ from the preset"""
    source: str
    ledger_path: Path
    command: str

    @property
    def configuration(self) -> Configuration:
        key = digest({"trial": self.name, "version": self.trial.version, "inputs": self.inputs})
        return Configuration(key, self.name, self.path, self.preset, inputs_of(self.trial), self.command)

    @property
    def home(self) -> Path:
        return self.ledger_path.parent

    @property
    def own_inputs(self) -> bool:
        """Whether the user brought a model or data of their own."""
        return any(name in self.changed for name in ("model", "data"))

    @property
    def timed(self) -> bool:
        """Whether a time decides, so that runs must not disturb each other."""
        claim = self.trial.claim
        saving = () if claim.saving is None else (claim.saving.name,)
        units = (self.trial.budget.unit, *self.trial.budget.settings.values(), *saving)
        units += tuple(endpoint.unit for endpoint in (*claim.endpoints, *([self.endpoint] if self.endpoint else [])))
        return any(unit in TIME_UNITS for unit in units)

    def planned(self, arm: Arm, seed: int, purpose: str = "trial") -> PlannedRun:
        identity = run_identity(self.name, self.trial, self.inputs, arm, seed)
        return PlannedRun(
            id=digest({"identity": identity, "source": self.source}, size=6),
            identity=identity,
            source=self.source,
            configuration=self.configuration.key,
            trial=self.name,
            setting=arm.setting,
            arm=arm.name,
            seed=seed,
            options=dict(arm.options),
            purpose=purpose,
        )

    def task(self, run: PlannedRun, row: str, threads: int) -> Task:
        return Task(
            run=row,
            path=self.path,
            inputs=inputs_of(self.trial),
            arm=run.arm,
            setting=run.setting,
            options=run.options,
            seed=run.seed,
            folder=str(self.home / "runs" / row),
            stages=str(self.home / "stages"),
            threads=threads,
            source=self.source,
            keep_model=self.options.keep_models,
        )


def presets_of(trial: type[Trial]) -> dict[str, Mapping[str, Any]]:
    return dict(trial.presets) or {"tiny": {}}


def choose_preset(name: str, trial: type[Trial], preset: str | None) -> str:
    presets = presets_of(trial)
    if preset is None:
        return "tiny" if "tiny" in presets else next(iter(presets))
    if preset not in presets:
        raise ValueError(f"{name} has no preset {preset!r}; it has {', '.join(presets)}")
    return preset


def preset_fields(trial: type[Trial], preset: str) -> dict[str, Any]:
    return {key: value for key, value in presets_of(trial)[preset].items() if key not in RESERVED}


def prepare(name: str, fields: Mapping[str, Any], options: RunOptions, *, command: str = "") -> Prepared:
    """Settles inputs, arms and seeds. Raises ValueError or FileNotFoundError, before anything is stored or started."""
    cls = load_trial(name)
    preset = choose_preset(name, cls, options.preset)
    defaults = {field.name: getattr(cls, field.name, None) for field in dataclasses.fields(cls)} | preset_fields(
        cls, preset
    )
    for field in fields:
        if field not in defaults:
            near = difflib.get_close_matches(field, [*defaults, *RunOptions.__dataclass_fields__], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(defaults)}"
            raise ValueError(f"trial {name!r} has no option {field!r}; {hint}")
    for field, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.replace('_', '-')} must be a finite number, not {value}")
    trial: Trial = cls(**(defaults | dict(fields)))
    endpoint = None
    if names_benchmark(options.endpoint):
        trial, endpoint = trial.with_benchmark(str(options.endpoint))
        endpoint = dataclasses.replace(endpoint, margin=options.margin)
    trial.check()
    changed = tuple(field for field, value in fields.items() if value != defaults[field])
    arms = tuple(trial.arms())
    check_arms(name, trial, arms)
    if options.arms:
        missing = [arm for arm in options.arms if arm not in {candidate.name for candidate in arms}]
        if missing:
            raise ValueError(
                f"{name} has no arm {missing[0]!r}; it has {', '.join(dict.fromkeys(arm.name for arm in arms))}"
            )
        arms = tuple(arm for arm in arms if arm.name in options.arms)
        check_choice(name, arms)
    own = any(field in changed for field in ("model", "data"))
    seeds = options.seeds
    if seeds is None:
        fallback = 1 if trial.replicates_over() == "item" else 6
        seeds = fallback if own else presets_of(cls)[preset].get("seeds", fallback)
    if options.until_decided and options.look_points() is not None and options.seeds is None:
        seeds = max(options.look_points() or ())
    path = Path(options.ledger).absolute() if options.ledger else home_folder() / "ledger.db"
    return Prepared(
        name=name,
        path=trial_paths()[name],
        trial=trial,
        preset=preset,
        arms=arms,
        seeds=tuple(range(options.seed_start, options.seed_start + seeds)),
        options=options,
        endpoint=endpoint or replaced_endpoint(trial, options),
        inputs=inputs_by_content(trial),
        changed=changed,
        source=source_digest(trial_paths()[name], trial.sources()),
        ledger_path=path,
        command=command or f"trialist run {name} --preset {preset}",
    )


def rebuild(configuration: Configuration, ledger_path: Path) -> Trial:
    """The trial of a stored configuration."""
    inputs = {key: tuple(value) if isinstance(value, list) else value for key, value in configuration.inputs.items()}
    return load_path(configuration.path)(**inputs)


def check_arms(name: str, trial: Trial, arms: Sequence[Arm]) -> None:
    """Raises ValueError where the arms of a trial cannot give a verdict."""
    seen: set[tuple[str, str]] = set()
    for arm in arms:
        if (arm.name, arm.setting) in seen:
            raise ValueError(f"trial {name}: arm {arm.name!r} is declared twice in setting {arm.setting!r}")
        seen.add((arm.name, arm.setting))
    for setting, members in settings_of(list(arms)).items():
        roles = [arm.role for arm in members]
        if len({arm.null for arm in members}) > 1:
            raise ValueError(f"trial {name}: setting {setting!r} is null for some arms and not for others")
        if "factor" in roles:
            if any(role in ("control", "treatment") for role in roles) or trial.effect is None:
                raise ValueError(
                    f"trial {name}: factor arms stand alone and need `effect` from trialist.engine.effects"
                )
        elif roles.count("treatment") != 1 or "control" not in roles:
            raise ValueError(
                f"trial {name}: setting {setting!r} needs one treatment and at least one control, has {roles}"
            )
    primary_setting(list(arms))
    tuned = [arm for arm in arms if arm.tune is not None]
    if tuned and trial.tuning is None:
        raise ValueError(f"trial {name}: arm {tuned[0].name!r} has `tune`, but the trial declares no Tuning")
    for arm in tuned:
        points = math.prod(len(values) for values in (arm.tune or {}).values())
        if trial.tuning is not None and points != trial.tuning.tries:
            raise ValueError(
                f"trial {name}: arm {arm.name!r} tunes over {points} points, but every arm gets {trial.tuning.tries} tries"
            )
    for arm in arms:
        if arm.tuned_as is not None and (arm.tune is not None or arm.tuned_as not in {other.name for other in tuned}):
            raise ValueError(
                f"trial {name}: arm {arm.name!r} is tuned as {arm.tuned_as!r}, so it has no `tune` of its own, and that arm has"
            )


def names_benchmark(endpoint: str | None) -> bool:
    """Whether `--endpoint` names a benchmark of the runs' models, `family:name`, and no metric of the runs."""
    return endpoint is not None and ":" in endpoint.removesuffix(":higher").removesuffix(":lower")


def check_choice(name: str, arms: Sequence[Arm]) -> None:
    """Raises ValueError where the arms that --arms leaves cannot give a verdict."""
    if all(arm.null for arm in arms):
        raise ValueError(f"--arms leaves {name} no setting that decides; name arms of its other settings as well")
    names = {arm.name for arm in arms}
    for arm in arms:
        if arm.tuned_as not in (None, *names):
            raise ValueError(
                f"--arms leaves {arm.name} without {arm.tuned_as}, whose tuned values it takes; name that as well"
            )
    setting = primary_setting(list(arms))
    left = {arm.role for arm in arms if arm.setting == setting}
    missing = [role for role in ("treatment", "control") if role not in left]
    if missing and "factor" not in left:
        raise ValueError(
            f"--arms leaves setting {setting!r} of {name} without a {' and a '.join(missing)}, so there is nothing to compare; "
            f"`trialist show {name}` lists the arms with their roles"
        )


def replaced_endpoint(trial: Trial, options: RunOptions) -> Endpoint | None:
    """The endpoint of `--endpoint`, with the claim's direction for it where it knows one."""
    if options.endpoint is None:
        return None
    name, _, better = (
        options.endpoint.rpartition(":")
        if options.endpoint.endswith((":higher", ":lower"))
        else (options.endpoint, "", "")
    )
    known = next((endpoint for endpoint in trial.claim.endpoints if endpoint.name == name), None)
    if not better and known is None:
        raise ValueError(f"--endpoint {name}: say which direction is better, --endpoint {name}:higher or {name}:lower")
    direction: Better = "higher" if (better or (known and known.better)) == "higher" else "lower"
    if known is not None:
        return dataclasses.replace(known, margin=options.margin, better=direction)
    return Endpoint(name, better=direction, margin=options.margin)


def in_blocks(prepared: Prepared, arms: Sequence[Arm], seeds: Sequence[int]) -> list[PlannedRun]:
    """All arms of a seed next to each other, in random order: a half-finished trial is balanced, and drift hits all arms."""
    planned = []
    for seed in seeds:
        block = [prepared.planned(arm, seed) for arm in arms]
        random.Random(seed).shuffle(block)
        planned.extend(block)
    return planned
