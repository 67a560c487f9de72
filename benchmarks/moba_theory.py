"""Which block size and top_k find what a query looks for: the table and the picture of docs/moba.md, from the theory.

    python -m benchmarks.moba_theory

prints the table and writes docs/images/moba_gap.png. Nothing is measured here.
"""

from pathlib import Path

from pallas_kernels.moba import theory

PICTURE = Path(__file__).parents[1] / "docs/images/moba_gap.png"
BUDGET = 1024  # keys that a query attends to: block_size * top_k
BLOCK_SIZES = (512, 256, 128, 64)
HEAD_DIMS = (64, 128)
LENGTHS = (8192, 65536, 524288)


def table() -> str:
    """Markdown: the smallest effective gap that routing finds, and the cost of scoring relative to attention."""
    sizes = [f"B={size}, k={BUDGET // size}" for size in BLOCK_SIZES]
    lines = [f"| length | head dim | {' | '.join(sizes)} |", "|---" * (2 + len(sizes)) + "|"]
    for length in LENGTHS:
        for head_dim in HEAD_DIMS:
            cells = []
            for size in BLOCK_SIZES:
                gap = theory.required_gap(head_dim, size, BUDGET // size, length)
                cost = theory.scoring_cost(length, size, BUDGET // size)
                cells.append(f"{gap:.2f} ({100 * cost:.1f} %)")
            lines.append(f"| {length:,} | {head_dim} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for length, color in zip(LENGTHS, ("#7fb3d5", "#2e86c1", "#1b4f72"), strict=True):
        for head_dim, line in zip(HEAD_DIMS, ("--", "-"), strict=True):
            gaps = [theory.required_gap(head_dim, size, BUDGET // size, length) for size in BLOCK_SIZES]
            label = f"{length // 1024}K tokens, head dim {head_dim}"
            axes.plot(BLOCK_SIZES, gaps, line, color=color, marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BLOCK_SIZES, [f"{size}\nk={BUDGET // size}" for size in BLOCK_SIZES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"block size, with block size x k = {BUDGET}")
    axes.set_ylabel("smallest effective gap that is found")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    print(table())
    draw(PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
