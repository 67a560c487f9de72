"""Recipe `blocks`: do small blocks find more, and a key convolution more still?

A small model learns associative recall in noise (`jaxmodels.demo.recall`): its first layer sees a short window, its
last layer everything. Then copies of it train on for equally long, each with another last layer: one dense, the others
with blocks to select (`pallas_kernels.moba`), which all see the same number of keys, in few large blocks or many small
ones. All are asked the same held-out questions, before they train on and after. The whole is repeated over seeds.

Below `directory`, each skipped when it is complete:

    seed-<seed>/grow-<length>/      the common beginning, one run per length
    seed-<seed>/grow-<length>+3/    the same with a key convolution, for arms whose taps grow up with the model
    seed-<seed>/<arm>/              the copies
    results.json                    accuracy of every arm and seed, and differences between arms, paired by seed
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from train.config import MeshConfig, to_json
from train.machine import command_line, machine
from train.recipes.retrieval import Stage, make_answers, recall_config, train_stage

ARM = re.compile(r"(?:dense|(?P<block_size>[1-9]\d*)x(?P<top_k>[1-9]\d*))(?:\+(?P<taps>[1-9]\d*))?")
DENSE = "dense"
OF_ARMS = ("untrained", "training", "accuracy")
"""What is recorded of every arm and seed: accuracy before it trains on, of its batches meanwhile, and afterwards."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Train small retrieval models whose last layer selects blocks of several sizes, and compare what they find.

    python -m train blocks --directory runs/blocks

    Chance is 1 / values, and about 1 / pairs for a model that names some value of the row. The same command continues
    an interrupted run. Seeds may run side by side and be put together afterwards:

    python -m train blocks --seeds 0 --results runs/0.json & python -m train blocks --seeds 1 --results runs/1.json
    python -m train blocks --merge runs/0.json runs/1.json --results runs/blocks.json
    """

    directory: Path = Path("runs/blocks")
    results: Path | None = None
    """File of the results; None: results.json in the directory."""
    arms: tuple[str, ...] = ("64x2", "32x4", "16x8", "16x8+3")
    """Block size x blocks that a query selects, its own among them; +3: with a key convolution of so many taps. A dense
    arm is always there; dense+3 is one with a convolution."""
    taps: Literal["added", "grown"] = "added"
    """Where convolutions come from: added to the copy, with taps of 0; or there from the beginning, which these arms
    then have for themselves, with taps drawn as those of a PyTorch `Conv1d` are."""
    rotary: bool = True
    """The last layer rotates queries and keys; in the published hybrids layers that select do not."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and rows; everything is repeated for each."""
    merge: tuple[Path, ...] = ()
    """Train nothing, and put these files of results, of the same study with other seeds, together."""
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
    arm_learning_rate: float | None = None
    """Of the arms; None: a third of that of the beginning."""
    window: int = 64
    """Tokens that the first layer sees."""
    pairs: int = 16
    """Pairs hidden in each row, as far as it holds them; all are asked for."""
    keys: int = 128
    """Different keys; a row asks for some of them."""
    values: int = 128
    """Different values; chance is one in so many."""
    value_length: int = 1
    """Tokens of a value, all of which are asked for: what belongs to a key is then several neighbours."""
    noise: int = 255
    """Different tokens of noise."""
    text: Path | None = None
    """Directory of files whose bytes stand between the pairs instead of noise, and are learned as much as the answers
    are. The last tenth of them is for the test."""
    dim: int = 128
    learning_rate: float = 1e-3
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Of training and test; None: bfloat16 on a GPU, float32 on a CPU."""
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
            if arm == DENSE:
                raise ValueError("arms need not name dense, which is always there")
            parse(arm)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different ones and not none; got {self.seeds}")
        for name in ("arm_steps", "arm_batch_size", "window", "test_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.arm_learning_rate is not None and not self.arm_learning_rate > 0:
            raise ValueError(f"arm_learning_rate must be positive or None; got {self.arm_learning_rate}")
        if self.merge and self.results is None:
            raise ValueError("--merge needs --results FILE, where the whole goes")
        if self.dim < 64 or self.dim % 64:
            raise ValueError(f"dim must be a multiple of 64, the head dim; got {self.dim}")
        if self.test_rows % self.arm_batch_size:
            raise ValueError(
                f"test_rows must be a multiple of arm_batch_size, {self.arm_batch_size}; got {self.test_rows}"
            )


def parse(arm: str) -> tuple[int | None, int | None, int | None]:
    """Block size, blocks and taps of an arm, None where it has none. Raises ValueError for a name of another form."""
    if (found := ARM.fullmatch(arm)) is None:
        raise ValueError(f"an arm must look like 16x8 or 16x8+3, block size x blocks + taps; got {arm!r}")
    block_size, top_k, taps = (
        None if text is None else int(text) for text in found.group("block_size", "top_k", "taps")
    )
    return block_size, top_k, taps


def main(config: Blocks) -> int:
    """Runs the recipe; 0 when the results are written, 1 when it was interrupted."""
    if config.merge:
        assert config.results is not None  # checked above
        write(config.results, merged([json.loads(path.read_text()) for path in config.merge]))
        return 0

    from jaxmodels.demo.recall import Recall
    from train.mesh import make_mesh

    started = time.perf_counter()
    text = None if config.text is None else read_text(config.text)
    sizes = config.keys, config.values, config.noise if text is None else 256, config.value_length
    tasks = [
        Recall(length, min(config.pairs, Recall.most_pairs(length, config.value_length)), *sizes)
        for length in (*config.lengths, config.length)
    ]
    task = tasks[-1]
    if task.num_pairs != config.pairs:
        raise ValueError(f"pairs must be at most {task.num_pairs} in rows of {task.length} tokens; got {config.pairs}")
    held_out = None
    shared: dict[str, Any] = {"config": config, "mesh": make_mesh(MeshConfig()), "identity": {"recipe": "blocks"}}
    shared["compute_dtype"] = config.compute_dtype
    if text is not None:
        if len(text) < 10 * task.length:
            raise ValueError(f"{config.text} must hold at least {10 * task.length} bytes of UTF-8; got {len(text)}")
        shared["identity"]["text"] = hashlib.sha256(text.tobytes()).hexdigest()
        shared["text"], held_out = text[: -(len(text) // 10)], text[-(len(text) // 10) :]
    arms = (DENSE, *config.arms)
    results: dict[str, Any] = {
        "command": command_line(), "machine": machine(), "config": to_json(config),
        "chance": 1 / task.num_values, "questions": config.test_rows * len(task.questions),
        **{name: {arm: {} for arm in arms} for name in OF_ARMS},
    }  # fmt: skip
    path = config.results or config.directory / "results.json"
    for seed in config.seeds:
        beginnings: dict[int | None, tuple[Any, Any] | None] = {}
        for arm in arms:
            taps = parse(arm)[2] if config.taps == "grown" else None
            if taps not in beginnings:
                beginnings[taps] = grow(config, tasks, seed, taps, shared)
            if (beginning := beginnings[taps]) is None:
                return 1
            lm, params = with_last_layer(*beginning, arm)
            rate = config.learning_rate / 3 if config.arm_learning_rate is None else config.arm_learning_rate
            run = Stage(config.directory / f"seed-{seed}" / arm, config.arm_steps, config.arm_batch_size, rate, seed)
            identity = shared["identity"] | {"stage": arm, "taps": config.taps}
            tuned = train_stage(run, lm, task, params, **(shared | {"identity": identity}))
            if tuned is None:
                return 1
            before, after = accuracies(lm, (params, tuned), task, config, held_out)
            results["untrained"][arm][str(seed)], results["accuracy"][arm][str(seed)] = before, after
            results["training"][arm][str(seed)] = training(run.directory)
            results["seconds"] = time.perf_counter() - started
            write(path, results, quiet=True)
    write(path, results)
    return 0


def grow(
    config: Blocks, tasks: Sequence[Any], seed: int, taps: int | None, shared: dict[str, Any]
) -> tuple[Any, Any] | None:
    """The beginning that arms share, with a convolution of `taps` in its last layer: model and weights.

    None when it was interrupted.
    """
    import jax
    import jax.numpy as jnp

    from jaxmodels.qwen import LayerAttention, build

    layers = LayerAttention(window=config.window), LayerAttention(key_conv=taps, rotary=config.rotary)
    lm = build(recall_config(tasks[-1], config.dim, len(layers), layer_attention=layers))
    params: Any = None
    if taps is not None:
        key = jax.random.key(seed)
        params = lm.init(jax.random.fold_in(key, 0), jnp.float32)  # the weights of a beginning without taps
        attention = params["layers"]["attention"]
        bound = taps**-0.5
        drawn = jax.random.uniform(jax.random.fold_in(key, 1), attention["k_conv"].shape, minval=-bound, maxval=bound)
        params = params | {"layers": params["layers"] | {"attention": attention | {"k_conv": drawn}}}
    for task, steps, batch in zip(tasks, config.steps, config.batch_sizes, strict=False):
        name = f"grow-{task.length}" + ("" if taps is None else f"+{taps}")
        run = Stage(config.directory / f"seed-{seed}" / name, steps, batch, config.learning_rate, seed)
        identity = shared["identity"] | {"stage": "grow"}
        params = train_stage(run, lm, task, params, **(shared | {"identity": identity}))
        if params is None:
            return None
    return lm, params


def with_last_layer(lm: Any, params: Any, arm: str) -> tuple[Any, Any]:
    """Model and weights of an arm, from those of its beginning."""
    from jaxmodels.qwen import MobaConfig, build, route_layers

    block_size, top_k, taps = parse(arm)
    moba = None if block_size is None or top_k is None else MobaConfig(block_size, top_k)
    first, last = lm.config.layer_attention
    if last.key_conv is None:  # else the model has grown up with its taps
        config, params = route_layers(lm.config, params, [1], moba=moba, key_conv=taps)
    else:
        layers = first, dataclasses.replace(last, moba=moba)
        config = dataclasses.replace(lm.config, layer_attention=layers)
    return build(config), params


def read_text(directory: Path) -> Any:
    """The bytes of all files below a directory that are UTF-8, in the order of their names."""
    import numpy as np

    parts = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        part = path.read_bytes()
        try:
            part.decode()
        except UnicodeDecodeError:
            continue
        parts.append(part)
    return np.frombuffer(b"\n".join(parts), np.uint8)


def accuracies(lm: Any, weights: Sequence[Any], task: Any, config: Blocks, text: Any = None) -> Iterator[float]:
    """Share of right answers of each of the weights to the held-out rows, which are the same for all arms and seeds."""
    import jax
    import numpy as np

    from pallas_kernels.masks import Causal
    from train.loop import compute_dtype

    answers = make_answers(lm, task)
    for params in weights:
        params = jax.tree.map(lambda x: x.astype(compute_dtype(config.compute_dtype)), params)
        rng = np.random.default_rng(2**31)
        batches = [
            task.rows(rng, config.arm_batch_size, text) for _ in range(config.test_rows // config.arm_batch_size)
        ]
        correct = [np.asarray(answers(params, tokens, None, Causal())[0]) for tokens in batches]
        yield float(np.concatenate(correct).mean())


def training(directory: Path) -> list[tuple[int, float]]:
    """Updates, and the share of right answers in the batches since the record before."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train/accuracy"]) for record in records if "train/accuracy" in record]


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One study of several that differ in their seeds only. Raises ValueError where they differ in more."""
    own = ("directory", "results", "seeds", "merge")
    whole = dict(parts[0]) | {"command": [part["command"] for part in parts], "machine": [p["machine"] for p in parts]}
    whole["seconds"] = [part["seconds"] for part in parts]
    whole["config"] = parts[0]["config"] | {"seeds": [seed for part in parts for seed in part["config"]["seeds"]]}
    for name in OF_ARMS:
        whole[name] = {arm: dict(of_seeds) for arm, of_seeds in parts[0][name].items()}
    for part in parts[1:]:
        for field, value in part["config"].items():
            if field not in own and value != whole["config"].get(field):
                raise ValueError(f"cannot merge: {field} is {whole['config'].get(field)} and {value}")
        for name in OF_ARMS:
            for arm, of_seeds in part[name].items():
                if twice := whole[name][arm].keys() & of_seeds.keys():
                    raise ValueError(f"cannot merge: seed {min(twice)} of {arm} is there twice")
                whole[name][arm] |= of_seeds
    return whole


def write(path: Path, results: dict[str, Any], *, quiet: bool = False) -> None:
    """The file of results as far as they go, whole at every moment; unless quiet also the table and the file's name."""
    results["differences"] = differences(results["accuracy"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)
    if not quiet:
        print("\n".join(table(results)), flush=True)
        print(path)


def differences(accuracies: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Over the seeds that both have, mean and the half of a 95 % t interval of: each arm with blocks and without taps
    minus the one before it; each arm with taps minus the same without."""
    found = {}
    plain = [arm for arm in accuracies if arm != DENSE and parse(arm)[2] is None]
    convolved = [(arm.partition("+")[0], arm) for arm in accuracies if parse(arm)[2] is not None]
    for before, arm in (*itertools.pairwise(plain), *convolved):
        if before not in accuracies:
            continue
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
    for name, title in (("untrained", "as they begin:"), ("accuracy", "trained:")):
        lines.append(title)
        for arm, of_seeds in results[name].items():
            if values := [*of_seeds.values()]:
                single = " ".join(f"{value:.4f}" for value in values)
                lines.append(f"{arm:>10} {statistics.fmean(values):.4f} ± {interval(values):.4f}   {single}")
    for name, gain in results["differences"].items():
        lines.append(f"{name:>20} {gain['mean']:+.4f} ± {gain['interval']:.4f}")
    return lines
