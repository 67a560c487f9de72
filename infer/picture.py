"""The picture of the quickstart: what more tokens per forward pass gain in speed and cost in quality."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from infer.quickstart import Arm

DIFFUSION, BASELINE, QUIET = "#0b6e8a", "#d1495b", "#5f6b76"
SAME = "share before it differs from one a pass"
CLOSE = 20
"""Pixels between two points whose names would overlap."""
EDGE = 0.85
"""Share of the panel's width beyond which a name goes to the left of its point."""
Label = tuple[float, float, str]
STYLE: Any = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#323f4b",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


def draw(path: Path, arms: Sequence["Arm"], prompts: int, device: str, recorded: dict[str, Any] | None) -> None:
    """Writes the picture.

    Args:
        path: its ending decides the format.
        arms: the autoregressive one first, then one token a pass, then the thresholds, then other rules.
        prompts: how many each arm completed.
        device: named in the title.
        recorded: results.json of `python -m infer completions` for the same models, or None. With it the right panel
            shows validity on its many prompts; without, what the prompts of this run give.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        make_figure(arms, prompts, device, recorded).savefig(path)


def make_figure(arms: Sequence["Arm"], prompts: int, device: str, recorded: dict[str, Any] | None) -> "Figure":
    """The picture as a Matplotlib figure; arguments as in `draw`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.9), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        speed, quality = figure.subplots(1, 2)
        labels = {speed: _speed(speed, arms), quality: _quality(quality, arms, prompts, recorded)}
        handles = [handle for panel in (speed, quality) for handle in panel.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9.5)
        # Both panels share the axis, with room for the annotations beyond the last point.
        widest = max(max(limits.get_xlim()[1] for limits in (speed, quality)), 1.3)
        for panel in (speed, quality):
            panel.set_xlim(0.9, widest + 0.06 * (widest - 0.9))
            panel.set_xlabel("tokens per forward pass")
            _label(panel, labels[panel], below=panel is speed)
        figure.suptitle(
            "Block diffusion: several tokens per forward pass", x=0.01, ha="left", fontsize=14, fontweight="bold"
        )
        figure.supxlabel(
            f"{device} · {prompts} prompts, one request at a time, greedy · labels: threshold, or rule by name",
            x=0.01, ha="left", fontsize=9, color=QUIET,
        )  # fmt: skip
    return figure


def _speed(panel: "Axes", arms: Sequence["Arm"]) -> list["Label"]:
    baseline, diffusion = arms[0], arms[1:]
    x = [arm.tokens_per_forward for arm in diffusion]
    y = [arm.tokens_per_second for arm in diffusion]
    panel.set_title("Gain: speed")
    panel.set_ylabel("tokens per second")
    panel.axhline(baseline.tokens_per_second, color=BASELINE, linewidth=1, linestyle=(0, (4, 3)))
    panel.plot(
        [baseline.tokens_per_forward],
        [baseline.tokens_per_second],
        "*",
        color=BASELINE,
        markersize=14,
        label="autoregressive",
    )
    line = len(diffusion) - sum(_is_other(arm) for arm in diffusion)  # the last ones are no points of the line
    panel.plot(x[:line], y[:line], "o-", color=DIFFUSION, markersize=7, linewidth=2, label="block diffusion")
    panel.plot(x[line:], y[line:], "D", color=DIFFUSION, markersize=7)
    for arm in diffusion[line:]:
        _write(panel, arm.short, (arm.tokens_per_forward, arm.tokens_per_second), (-7, 5))
    panel.set_ylim(0, 1.18 * max([*y, baseline.tokens_per_second]))
    return list(zip(x[:line], y[:line], [arm.short for arm in diffusion[:line]], strict=True))


def _quality(panel: "Axes", arms: Sequence["Arm"], prompts: int, recorded: dict[str, Any] | None) -> list["Label"]:
    from jaxmodels.demo.completions import wilson_interval

    points: list[tuple[float, float, tuple[float, float], str]] = []
    if recorded is not None:
        results = recorded["arms"]
        count, what = recorded["prompts"], "valid completions"
        for name, arm in results.items():
            if "tokens_per_forward" in arm:
                label = {"ar": "AR", "dlm-one": "one a pass"}.get(name, name.removeprefix("dlm-").replace("-", " "))
                label = label.replace(" lookahead", "\nlookahead")
                points.append((arm["tokens_per_forward"], arm["valid"], tuple(arm["valid_interval"]), label))
    else:
        count, what = prompts, "completions that parse, ≥ 3 statements"
        for arm in arms:
            label = "AR" if arm is arms[0] else arm.short
            interval = wilson_interval(arm.valid, count)
            points.append((arm.tokens_per_forward, arm.valid / count, interval, label))
    panel.set_title(f"Cost: quality ({count:,} prompts, 95 % intervals)")
    panel.set_ylabel(f"{what} (%)")
    baseline, diffusion = points[0], points[1:]
    _interval(panel, [baseline], BASELINE, "*", 14, "none")
    _interval(panel, diffusion, DIFFUSION, "o", 7, "-")
    panel.axhline(100 * baseline[1], color=BASELINE, linewidth=1, linestyle=(0, (4, 3)))
    if recorded is not None and "file" in recorded["arms"]:
        ceiling = 100 * recorded["arms"]["file"]["valid"]
        panel.axhline(ceiling, color=QUIET, linewidth=1, linestyle=":")
        panel.annotate(
            "the files' own continuations", (1, ceiling), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", color=QUIET, fontsize=9.5,
        )  # fmt: skip
    else:
        same = [(arm.tokens_per_forward, 100 * arm.agreement) for arm in arms if arm.agreement is not None]
        panel.plot(*zip(*same, strict=True), "s:", color=QUIET, markersize=4.5, linewidth=1.3, label=SAME)
    low, high = panel.get_ylim()
    panel.set_ylim(max(0, low - 0.1 * (high - low)), min(105, high + 0.05 * (high - low)))
    return [(p[0], 100 * p[1], p[3]) for p in diffusion]


def _interval(panel: "Axes", points: Sequence, color: str, marker: str, size: int, line: str) -> None:
    x, y = [p[0] for p in points], [100 * p[1] for p in points]
    errors = [[100 * (p[1] - p[2][0]) for p in points], [100 * (p[2][1] - p[1]) for p in points]]
    panel.errorbar(
        x, y, yerr=errors, color=color, marker=marker, markersize=size, linestyle=line, linewidth=2,
        elinewidth=1, capsize=3, ecolor=color,
    )  # fmt: skip


def _label(panel: "Axes", labels: Sequence[Label], *, below: bool) -> None:
    """Writes names beside points, on the side where the line is not; points in one place share theirs."""
    groups: list[list[Label]] = []
    for label in labels:
        if groups:
            before, here = panel.transData.transform([groups[-1][-1][:2], label[:2]])
            if abs(here - before).max() < CLOSE:
                groups[-1].append(label)
                continue
        groups.append([label])
    for i, group in enumerate(groups):
        x, y, _ = group[-1]
        # Above the first point stands the autoregressive one, and its name is the longest: one line deeper.
        drop = -25 if i == 0 else -13 if below else 5
        # Names at the right edge would leave the panel.
        inside = panel.transAxes.inverted().transform(panel.transData.transform((x, y)))[0] < EDGE
        _write(panel, ", ".join(name for *_, name in group), (x, y), (7, drop) if inside else (-7, 9))


def _write(panel: "Axes", name: str, point: tuple[float, float], offset: tuple[int, int]) -> None:
    """A name beside a point, readable over lines."""
    from matplotlib.patheffects import withStroke

    text = panel.annotate(
        name, point, xytext=offset, textcoords="offset points", color=DIFFUSION, fontsize=9.5, fontweight="bold",
        ha="left" if offset[0] > 0 else "right",
    )  # fmt: skip
    text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _is_other(arm: "Arm") -> bool:
    """Whether it is neither one token a pass nor a threshold."""
    return bool(arm.reveal) and "threshold" not in arm.reveal
