"""Pictures of a summary, one per question where a table is hard to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.ablation.arms import BLOCK, BLOCKS, DEFAULT
from train.ablation.summary import arm_of

RULES = ("one token", "threshold 0.9", "threshold 0.7", "threshold 0.5", "2 tokens")


def draw(summary: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes what the summary has the numbers for; bars are 95 % intervals over seeds."""
    from matplotlib.figure import Figure

    values = summary["values"]
    made = []

    def save(name: str, fill: Any, xlabel: str, ylabel: str) -> None:
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axes = figure.add_subplot()
        if not fill(axes):
            return
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        figure.savefig(directory / f"{name}.png", dpi=130)
        made.append(directory / f"{name}.png")

    def errors(axes: Any, xs: list, entries: list, scale: float = 1.0, **style: Any) -> None:
        means = [scale * entry[0] for entry in entries]
        halves = [scale * (entry[1] or 0.0) for entry in entries]
        axes.errorbar(xs, means, halves, capsize=3, marker="o", markersize=4, **style)

    def blocks(axes: Any) -> bool:
        drawn = False
        for trained in BLOCKS:
            found = [(b, values.get(f"bound/{b}", {}).get(arm_of(trained))) for b in BLOCKS]
            found = [(b, entry) for b, entry in found if entry]
            if found:
                errors(axes, [b for b, _ in found], [entry for _, entry in found], label=f"trained on {trained}")
                drawn = True
        axes.set_xscale("log", base=2)
        axes.set_xticks(BLOCKS, [str(b) for b in BLOCKS])
        return drawn

    def offsets(axes: Any) -> bool:
        drawn = False
        for trained in BLOCKS:
            entries = summary["offsets"].get(arm_of(trained))
            if entries:
                errors(axes, list(range(len(entries))), entries, label=f"block {trained}")
                drawn = True
        return drawn

    def curves(axes: Any, named: Mapping[str, tuple[int, str]], points: str) -> bool:
        """Validity against speed, of decoding blocks and arms by label."""
        found = []
        for label, (block, arm) in named.items():
            ways = [f"{block}/{rule}" for rule in RULES]
            entries = [[values.get(f"{way}/{y}", {}).get(arm) for y in ("tokens_per_forward", "valid")] for way in ways]
            if pairs := [(x[0], y) for x, y in entries if x and y]:
                found.append((label, pairs))
        for i, (label, pairs) in enumerate(found):
            aside = 0.006 * (i - (len(found) - 1) / 2)  # or the bars would hide each other
            errors(axes, [x + aside for x, _ in pairs], [y for _, y in pairs], 100.0, label=points.format(label))
        return bool(found)

    def half_life(axes: Any) -> bool:
        ratios = {"inf": "lambda-inf", "0.25": "lambda-0.25", "0.1": DEFAULT, "0.05": "lambda-0.05", "0": "lambda-0"}
        return curves(axes, {ratio: (BLOCK, arm) for ratio, arm in ratios.items()}, "λ = {}")

    def decoding(axes: Any) -> bool:
        return curves(axes, {str(block): (block, DEFAULT) for block in BLOCKS}, "decoding block {}")

    save("blocks", blocks, "decoding block", "bound, nats per token")
    save("offsets", offsets, "offset in the block", "bound, nats per token")
    save("half_life", half_life, "tokens per forward", "valid completions, %")
    save("decoding", decoding, "tokens per forward", "valid completions, %")
    return made
