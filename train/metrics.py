"""What a run reports: metrics.jsonl, TensorBoard event files, and lines or a progress bar on stderr."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress

__all__ = ["MetricsLog", "Reporter"]

Value = int | float | list


class MetricsLog:
    """Appends records to metrics.jsonl, each a flat JSON object with "step", "time" and metric names.

    A run that continues from step n first drops the records after n: they will be written again.
    Non-finite numbers are written as null, which JSON has.
    """

    def __init__(self, directory: Path, *, step: int, tensorboard: bool = False):
        self.path = directory / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if _step_of(line) <= step] if step else []
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), "utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(str(directory / "tb"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes the metrics after `step` updates and flushes them to the operating system."""
        record = {"step": step, "time": round(time.time(), 3)} | {k: _finite(v) for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                for i, x in enumerate(value) if isinstance(value, list) else [("", value)]:
                    self._events.add_scalar(f"{name}/{i}" if i != "" else name, x, step)
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def _step_of(line: str) -> int | float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
        return math.inf


def _finite(value: Value) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def averages(sums: Mapping[str, tuple[Any, Any]], prefix: str) -> dict[str, Value]:
    """name -> (sum, weight) as prefix/name -> sum / weight; nan where the weight is 0."""
    result: dict[str, Value] = {}
    for name, (total, weight) in sums.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(weight > 0, total / weight, np.nan)
        result[f"{prefix}/{name}"] = mean.tolist()
    return result


class Reporter:
    """Progress for people, on stderr: a bar on a terminal, plain lines elsewhere. Silent if not `enabled`."""

    def __init__(self, *, enabled: bool = True, console: rich.console.Console | None = None):
        self.enabled = enabled
        self.console = console or rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._total = 0

    def line(self, text: str) -> None:
        """One line of text."""
        if self.enabled:
            self.console.print(text, markup=False)

    def start(self, step: int, total: int) -> None:
        """Begins to show progress from `step` of `total` updates."""
        self._total = total
        if self.enabled and self.console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("training"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                rich.progress.TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total, completed=step, text="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar; cheap enough for every step."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: Mapping[str, Value], seconds_left: float | None) -> None:
        """Shows the metrics of a log step."""
        short = [
            f"{label} {form.format(values[name])}"
            for name, label, form in (
                ("train/loss", "loss", "{:.4f}"),
                ("train/grad_norm", "grad", "{:.3g}"),
                ("train/learning_rate", "lr", "{:.2e}"),
                ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
                ("perf/mfu", "mfu", "{:.1%}"),
                ("train/rejected", "rejected", "{:.0f}"),
            )
            if name in values and (name != "train/rejected" or values[name])
        ]
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text="  ".join(short))
        else:
            left = "" if seconds_left is None else f"  left {_duration(seconds_left)}"
            self.line(f"step {step}/{self._total}  {'  '.join(short)}{left}")

    def evaluation(self, step: int, values: Mapping[str, Value]) -> None:
        """Shows scalar results of an evaluation."""
        text = "  ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in values.items() if not isinstance(v, list))
        self.line(f"step {step}/{self._total}  held out: {text}")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
