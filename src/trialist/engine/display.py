"""What a person sees while a trial runs: one live table with a row a run on a terminal, clean lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trialist.engine.execute import Event
from trialist.engine.records import PlannedRun

PACE_SECONDS = 5.0
FIRST_SILENCE = 600.0
"""Seconds without a sign of life after which lines speak of it; the table does so after one minute"""
LEAST_WIDTH = {"status": 9, "time": 6, "left": 6}
"""Columns of the table that a narrow terminal does not cut short; what was measured gives way"""
STYLES = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "diverged": "yellow",
    "queued": "dim",
    "elsewhere": "magenta",
}


@dataclass
class Row:
    run: PlannedRun
    status: str = "queued"
    done: float = 0.0
    total: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""
    elapsed: float = 0.0
    """Seconds since its start, also while it reports nothing"""
    silent: float = 0.0
    """Seconds since its last sign of life"""
    first: tuple[float, float] | None = None
    """Seconds and work done at the first report of the work under way: what came before it (imports, stages, work of another
    size) tells nothing of the pace"""

    @property
    def share(self) -> float:
        return 1.0 if self.status in ("done", "diverged") else (self.done / self.total if self.total else 0.0)

    @property
    def seconds_left(self) -> float | None:
        """None until the run has shown its pace for some seconds."""
        if self.status != "running" or self.first is None or self.seconds - self.first[0] < PACE_SECONDS:
            return None
        if self.done <= self.first[1]:
            return None
        return (self.seconds - self.first[0]) / (self.done - self.first[1]) * (self.total - self.done)

    @property
    def seconds_in_all(self) -> float | None:
        if self.status in ("done", "diverged"):
            return self.seconds or None
        return None if self.seconds_left is None else self.seconds + self.seconds_left


class Forecast:
    """Time left, from the runs seen so far: finished ones, and running ones by their share of the work."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def seconds_per_run(self, rows: Sequence[Row]) -> float | None:
        """None until some run is far enough to tell."""
        seen = [seconds for row in rows if (seconds := row.seconds_in_all) is not None]
        return sum(seen) / len(seen) if seen else None

    def seconds_left(self, rows: Sequence[Row]) -> float | None:
        each = self.seconds_per_run(rows)
        if each is None:
            return None
        open_rows = [row for row in rows if row.status in ("queued", "running")]
        work = sum(row.seconds_left if row.seconds_left is not None else each for row in open_rows)
        return max(work / self.slots, max((row.seconds_left or 0.0 for row in open_rows), default=0.0))


class Display:
    """A listener for `execute`. Use as a context manager; `add` announces the runs of a phase (tuning, trial, a look)."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.rows: dict[str, Row] = {}
        self.forecast = Forecast(1)
        self.phase = ""
        self._live: Live | None = None
        self._drawn = 0.0

    def add(
        self, runs: Sequence[PlannedRun], answers: dict[str, str], statuses: dict[str, str], slots: int, phase: str
    ) -> None:
        self.forecast = Forecast(slots)
        self.phase = phase
        self.rows = {}
        for run in runs:
            row = answers[run.id]
            status = statuses[row]
            self.rows[row] = Row(run, "queued" if status == "running" else status)
        finished = sum(row.status not in ("queued", "running") for row in self.rows.values())
        reused = f", {finished} of them already in the ledger" if finished else ""
        self.say(f"{phase}: {len(self.rows)} runs{reused}, {slots} at a time")
        if self.console.is_terminal and not self.quiet and finished < len(self.rows):
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def pause(self) -> None:
        """Takes the live table away, for a question or an end."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        row = self.rows[event.run]
        if event.kind == "progress":
            if row.first is None or event.total != row.total or event.done < row.done:
                row.first = (event.seconds, event.done)
            row.done, row.total, row.seconds = event.done, event.total, event.seconds
            row.numbers.update(event.numbers)
            row.elapsed, row.silent = event.seconds, 0.0
        elif event.kind == "alive":
            self._alive(row, event)
        elif event.kind == "started":
            row.status = "running"
        elif event.kind == "released":
            row.status = "queued"
        else:
            row.status, row.message = event.kind, event.message
            row.seconds = event.seconds or row.seconds
            row.numbers = dict(event.numbers) or row.numbers
            if self._live is None and event.kind != "elsewhere":
                self._line(row)
        if self._live is not None and (
            event.kind not in ("progress", "alive") or time.monotonic() - self._drawn > 0.25
        ):
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _alive(self, row: Row, event: Event) -> None:
        """Off a terminal a long silence is said after 10 minutes, and again whenever it has doubled."""
        if self._live is None:
            minutes = FIRST_SILENCE / 60
            while minutes * 60 <= row.silent:
                minutes *= 2
            if event.silent >= minutes * 60:
                run = f"{row.run.setting} · {row.run.arm} · seed {row.run.seed}"
                self.say(f"{run}: silent for {duration(event.silent)}")
        row.elapsed, row.silent = event.seconds, event.silent

    def _line(self, row: Row) -> None:
        finished = sum(entry.status not in ("queued", "running", "elsewhere") for entry in self.rows.values())
        left = self.forecast.seconds_left(list(self.rows.values()))
        parts = [
            f"[{finished}/{len(self.rows)}] {row.run.setting} · {row.run.arm} · seed {row.run.seed}: {row.status}",
            _numbers(row.numbers),
            duration(row.seconds),
            row.message,
            f"about {duration(left)} left" if left else "",
        ]
        self.say(", ".join(part for part in parts if part))

    def _table(self) -> Group:
        height = max(6, self.console.size.height - 6)
        rows = list(self.rows.values())
        shown = rows
        if len(rows) > height:  # what runs, what failed, then what ended last and what comes next
            order = {"running": 0, "failed": 1, "diverged": 1, "elsewhere": 2, "queued": 3, "done": 4}
            ranked = sorted(range(len(rows)), key=lambda index: (order[rows[index].status], index))[:height]
            shown = [rows[index] for index in sorted(ranked)]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("setting", "arm", "seed", "status", "progress", "measured", "time", "left"):
            table.add_column(
                column,
                justify="right" if column in ("seed", "time", "left") else "left",
                no_wrap=True,
                min_width=LEAST_WIDTH.get(column),
            )
        for row in shown:
            table.add_row(
                row.run.setting,
                row.run.arm,
                str(row.run.seed),
                Text(row.status, style=STYLES.get(row.status, "")),
                ProgressBar(total=1.0, completed=row.share, width=16),
                row.message
                or _numbers(row.numbers)
                + (f"  silent for {duration(row.silent)}" if row.status == "running" and row.silent >= 60 else ""),
                duration(row.elapsed if row.status == "running" else row.seconds),
                duration(row.seconds_left),
            )
        finished = sum(row.status not in ("queued", "running", "elsewhere") for row in rows)
        left = self.forecast.seconds_left(rows)
        tail = f"{self.phase}: {finished} of {len(rows)} runs finished" + (
            f", about {duration(left)} left" if left else ""
        )
        if len(shown) < len(rows):
            tail += f" ({len(rows) - len(shown)} rows not shown)"
        return Group(table, Text(tail, style="bold"))

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: Any) -> None:
        self.pause()


def duration(seconds: float | None) -> str:
    """`41 s`, `6 min`, `2.5 h`; empty for None and 0."""
    if not seconds:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _numbers(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:3])
