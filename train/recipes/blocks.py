"""Recipe `blocks`: do small blocks find more, and a key convolution more still?

A small model learns associative recall in noise (`jaxmodels.demo.recall`): its first layer sees a short window, its
last layer everything. Then copies of it train on for equally long, each with another last layer: one dense, the others
with blocks to select (`pallas_kernels.moba`), which all see the same number of keys, in few large blocks or many small
ones. All are asked the same held-out questions. The whole is repeated over seeds.

Below `directory`, each skipped when it is complete:

    seed-<seed>/grow-<length>/      the common beginning, one run per length
    seed-<seed>/<arm>/              the copies
    results.json                    accuracy of every arm and seed, and differences between arms, paired by seed
"""

import dataclasses
import itertools
import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

from train.config import MeshConfig, to_json
from train.machine import command_line, machine
from train.recipes.retrieval import Stage, make_answers, recall_config, train_stage

ARM = re.compile(r"(?P<block_size>[1-9]\d*)x(?P<top_k>[1-9]\d*)(?:\+(?P<taps>[1-9]\d*))?")
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Train small retrieval models whose last layer selects blocks of several sizes, and compare what they find.

    python -m train blocks --directory runs/blocks

    Chance is 1 / values, and about 1 / pairs for a model that names some value of the row. The same command continues
    an interrupted run.
    """

    directory: Path = Path("runs/blocks")
    results: Path | None = None
    """File of the results; None: results.json in the directory."""
    arms: tuple[str, ...] = ("64x2", "32x4", "16x8", "16x8+3")
    """Block size x blocks that a query selects, its own among them; +3: with a key convolution of so many taps. A dense
    arm is always there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and rows; everything is repeated for each."""
    lengths: tuple[int, ...] = (17, 33, 64, 128, 256)
    """Tokens per row while the common beginning grows; see the recipe `retrieval`."""
    steps: tuple[int, ...] = (1200, 200, 200, 150, 150)
    """Updates at each length."""
    batch_sizes: tuple[int, ...] = (256, 128, 64, 32, 16)
    """Rows per update at each length."""
    length: int = 512
    """Tokens per row that the arms train on and are tested on."""
    arm_steps: int = 200
    """Updates of each arm."""
    arm_batch_size: int = 16
    """Rows per update of each arm."""
    window: int = 64
    """Tokens that the first layer sees."""
    pairs: int = 16
    """Pairs hidden in each row, as far as it holds them; all are asked for."""
    keys: int = 128
    """Different keys; a row asks for some of them."""
    values: int = 128
    """Different values; chance is one in so many."""
    noise: int = 255
    """Different tokens of noise."""
    dim: int = 128
    learning_rate: float = 1e-3
    test_rows: int = 256
    """Held-out rows that all arms are tested on."""

    def __post_init__(self):
        if not self.lengths or not len(self.lengths) == len(self.steps) == len(self.batch_sizes):
            raise ValueError(
                "lengths, steps and batch_sizes must be equally many and not none; got "
                f"{self.lengths}, {self.steps} and {self.batch_sizes}"
            )
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms must be different ones and not none; got {self.arms}")
        for arm in self.arms:
            parse(arm)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different ones and not none; got {self.seeds}")
        for name in ("arm_steps", "arm_batch_size", "window", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.dim < 64 or self.dim % 64:
            raise ValueError(f"dim must be a multiple of 64, the head dim; got {self.dim}")
        if self.test_rows % self.arm_batch_size:
            raise ValueError(
                f"test_rows must be a multiple of arm_batch_size, {self.arm_batch_size}; got {self.test_rows}"
            )


def parse(arm: str) -> tuple[int, int, int | None]:
    """Block size, blocks and taps of an arm. Raises ValueError for a name of another form."""
    if (found := ARM.fullmatch(arm)) is None:
        raise ValueError(f"an arm must look like 16x8 or 16x8+3, block size x blocks + taps; got {arm!r}")
    return int(found["block_size"]), int(found["top_k"]), int(found["taps"]) if found["taps"] else None


def main(config: Blocks) -> int:
    """Runs the recipe; 0 when the results are written, 1 when it was interrupted."""
    from jaxmodels.demo.recall import Recall
    from jaxmodels.qwen import LayerAttention, MobaConfig, build, route_layers
    from train.mesh import make_mesh

    started = time.perf_counter()
    sizes = config.keys, config.values, config.noise
    tasks = [
        Recall(length, min(config.pairs, (length - 1) // 4), *sizes) for length in (*config.lengths, config.length)
    ]
    task = tasks[-1]
    if task.num_pairs != config.pairs:
        raise ValueError(f"pairs must be at most {task.num_pairs} in rows of {task.length} tokens; got {config.pairs}")
    attention = (LayerAttention(window=config.window), LayerAttention())
    lm = build(recall_config(task, config.dim, 2, layer_attention=attention))
    mesh = make_mesh(MeshConfig())
    results: dict[str, Any] = {
        "command": command_line(), "machine": machine(), "config": to_json(config),
        "chance": 1 / task.num_values, "questions": config.test_rows * task.num_pairs,
        "accuracy": {arm: {} for arm in (DENSE, *config.arms)},
    }  # fmt: skip
    path = config.results or config.directory / "results.json"
    for seed in config.seeds:
        directory = config.directory / f"seed-{seed}"
        shared: dict[str, Any] = {"config": config, "mesh": mesh}
        params: Any = None
        for stage, steps, batch in zip(tasks, config.steps, config.batch_sizes, strict=False):
            run = Stage(directory / f"grow-{stage.length}", steps, batch, config.learning_rate, seed)
            params = train_stage(run, lm, stage, params, identity={"recipe": "blocks", "stage": "grow"}, **shared)
            if params is None:
                return 1
        for arm in (DENSE, *config.arms):
            own, start = lm, params
            if arm != DENSE:
                block_size, top_k, taps = parse(arm)
                moba = MobaConfig(block_size=block_size, top_k=top_k)
                routed, start = route_layers(lm.config, params, [1], moba=moba, key_conv=taps)
                own = build(routed)
            run = Stage(directory / arm, config.arm_steps, config.arm_batch_size, config.learning_rate / 3, seed)
            tuned = train_stage(run, own, task, start, identity={"recipe": "blocks", "stage": arm}, **shared)
            if tuned is None:
                return 1
            results["accuracy"][arm][str(seed)] = accuracy(own, tuned, task, config)
            results["differences"] = differences(results["accuracy"])
            results["seconds"] = time.perf_counter() - started
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)), flush=True)
    print(path)
    return 0


def accuracy(lm: Any, params: Any, task: Any, config: Blocks) -> float:
    """Share of right answers to the held-out rows, which are the same for all arms and seeds."""
    import jax
    import numpy as np

    from pallas_kernels.masks import Causal
    from train.loop import compute_dtype

    answers = make_answers(lm, task)
    params = jax.tree.map(lambda x: x.astype(compute_dtype(None)), params)
    rng = np.random.default_rng(2**31)
    batches = [task.rows(rng, config.arm_batch_size) for _ in range(config.test_rows // config.arm_batch_size)]
    correct = [np.asarray(answers(params, tokens, None, Causal())[0]) for tokens in batches]
    return float(np.concatenate(correct).mean())


def differences(accuracies: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each arm minus the one before it, over the seeds that both have: mean and the half of a 95 % t interval."""
    found = {}
    arms = [arm for arm in accuracies if arm != DENSE]
    for before, arm in itertools.pairwise(arms):
        seeds = accuracies[before].keys() & accuracies[arm].keys()
        gains = [accuracies[arm][seed] - accuracies[before][seed] for seed in sorted(seeds)]
        if gains:
            found[f"{arm} - {before}"] = {"mean": statistics.fmean(gains), "interval": interval(gains), "n": len(gains)}
    return found


def interval(values: list[float]) -> float:
    """Half of the 95 % t interval of the mean; NaN for a single value."""
    from scipy.stats import t  # comes with JAX

    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    lines = [f"accuracy of {results['questions']} answers (chance {results['chance']:.4f}), 95 % over seeds"]
    for arm, of_seeds in results["accuracy"].items():
        values = [*of_seeds.values()]
        single = " ".join(f"{value:.4f}" for value in values)
        lines.append(f"{arm:>10} {statistics.fmean(values):.4f} ± {interval(values):.4f}   {single}")
    for name, gain in results["differences"].items():
        lines.append(f"{name:>20} {gain['mean']:+.4f} ± {gain['interval']:.4f}")
    return lines
