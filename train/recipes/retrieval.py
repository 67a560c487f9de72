"""Recipe `retrieval`: does a model that skips tiles of attention still find what it is asked for?

One small model learns associative recall in noise (`jaxmodels.demo.recall`), on rows that grow to the full length. Then
two copies train on for equally long: one densely, one with skip-softmax attention at a fixed threshold, forward and
backward. Both are asked the same questions under many thresholds, and accuracy is reported against the share of tiles
that was really skipped.

Below `directory`, each skipped when it is complete:

    grow-<length>/           the common beginning, one run per length
    dense/, aware/           the two copies
    results.json             accuracy and measured sparsity of both under every threshold, and of a window that
                             visits as few tiles but chooses them by place
"""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.config import MeshConfig, OptimConfig, RunConfig, to_json
from train.machine import command_line, machine

if TYPE_CHECKING:  # importing a recipe must stay quick: `--help` imports it
    from jaxmodels.demo.recall import Recall
    from jaxmodels.sparse_attention import SkipAttention
    from train.step import LossFn

THRESHOLDS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Train a small retrieval model twice, densely and with skipped tiles, and compare what each still finds.

    python -m train retrieval --directory runs/retrieval

    Chance is 1 / values. The same command continues an interrupted run.
    """

    directory: Path = Path("runs/retrieval")
    results: Path | None = None
    """File of the results; None: results.json in the directory."""
    lengths: tuple[int, ...] = (17, 33, 64, 128, 256, 512, 2048)
    """Tokens per row, growing; the last is the length that is tested. The short ones hold as many pairs as they can
    and no noise: there a model finds out within hundreds of updates that the value stands behind the key, which it did
    not in thousands of updates on noisy rows."""
    steps: tuple[int, ...] = (1200, 200, 200, 150, 150, 150, 100)
    """Updates at each length."""
    batch_sizes: tuple[int, ...] = (256, 128, 64, 32, 16, 16, 8)
    """Rows per update at each length."""
    tune_steps: int = 100
    """Updates of each of the two copies, at the last length."""
    threshold: float = 0.3
    """λ of the copy that trains with skipped tiles."""
    rows: int = 64
    """Tokens of a head that vote together on a tile."""
    width: int = 64
    """Keys of a tile."""
    pairs: int = 16
    """Pairs hidden in each row, as far as it holds them; all are asked for."""
    keys: int = 128
    """Different keys; a row asks for some of them."""
    values: int = 128
    """Different values; chance is one in so many."""
    noise: int = 255
    """Different tokens of noise."""
    dim: int = 128
    layers: int = 2
    learning_rate: float = 1e-3
    test_rows: int = 256
    """Rows that both copies are tested on."""
    seed: int = 0

    def __post_init__(self):
        if not self.lengths or not len(self.lengths) == len(self.steps) == len(self.batch_sizes):
            raise ValueError(
                "lengths, steps and batch_sizes must be equally many and not none; got "
                f"{self.lengths}, {self.steps} and {self.batch_sizes}"
            )
        for name in ("tune_steps", "rows", "width", "test_rows", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must lie in (0, 1); got {self.threshold}")
        if self.dim < 64 or self.dim % 64:
            raise ValueError(f"dim must be a multiple of 64, the head dim; got {self.dim}")
        if self.test_rows % self.batch_sizes[-1]:
            raise ValueError(f"test_rows must be a multiple of {self.batch_sizes[-1]}; got {self.test_rows}")


class RecallRows:
    """Endless batches of the task, drawn from (seed, number of the batch); see `Recall.rows` for `text`."""

    def __init__(self, task: "Recall", count: int, seed: int, text: Any = None):
        self.task, self.count, self.seed, self.text, self.index = task, count, seed, text, 0

    def __next__(self):
        import numpy as np

        rng = np.random.default_rng((self.seed, self.task.length, self.index))
        self.index += 1
        return {"tokens": self.task.rows(rng, self.count, self.text)}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def make_recall_loss(lm: Any, task: "Recall", skip: "SkipAttention | None" = None, *, text: bool = False) -> "LossFn":
    """-log p of the answers (nats), summed over questions. Metrics: "accuracy"; with `skip` also "sparsity".

    With `text` the tokens between the pairs are predicted too, and their mean -log p ("text_nll") counts as much as
    that of the answers.
    """
    import jax
    import jax.numpy as jnp

    def loss_fn(params, batch, key):
        del key  # nothing is drawn
        tokens = batch["tokens"]
        hidden = lm.hidden(params, tokens, skip=skip, skip_stats=skip is not None)
        logits = lm.head(params, hidden.states[:, task.questions])
        answers = tokens[:, task.questions + 1]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], axis=-1)
        correct = (jnp.argmax(logits, axis=-1) == answers).astype(jnp.float32)
        metrics: dict[str, Any] = {"accuracy": jnp.sum(correct)}
        if skip is not None:
            counts = hidden.skip_stats.skipped, hidden.skip_stats.visited
            metrics["sparsity"] = tuple(jnp.sum(count.astype(jnp.float32)) for count in counts)
        loss_sum = jnp.sum(nll)
        if text:
            following = tokens[:, 1 : task.context]
            log_p = jax.nn.log_softmax(lm.head(params, hidden.states[:, : task.context - 1]))
            text_nll = -jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
            counted = following > task.num_keys + task.num_values
            total, count = jnp.sum(jnp.where(counted, text_nll, 0.0)), jnp.sum(counted.astype(jnp.float32))
            metrics["text_nll"] = total, count
            loss_sum += total / jnp.maximum(count, 1.0) * answers.size
        return loss_sum, jnp.float32(answers.size), metrics

    return loss_fn


def main(config: Retrieval) -> int:
    """Runs the recipe; 0 when the results are written, 1 when it was interrupted."""

    from jaxmodels.demo.recall import Recall
    from jaxmodels.qwen import build
    from jaxmodels.sparse_attention import SkipAttention
    from pallas_kernels.attention.skip import SkipTile
    from train.mesh import make_mesh

    started = time.perf_counter()
    sizes = config.keys, config.values, config.noise
    tasks = [Recall(length, min(config.pairs, Recall.most_pairs(length)), *sizes) for length in config.lengths]
    task = tasks[-1]
    if task.num_pairs != config.pairs:
        raise ValueError(f"pairs must be at most {task.num_pairs} in rows of {task.length} tokens; got {config.pairs}")
    lm = build(recall_config(task, config.dim, config.layers))
    mesh = make_mesh(MeshConfig())
    tile = SkipTile(config.rows, config.width)
    aware = SkipAttention.create(threshold=config.threshold, tile=tile)

    def train(name: str, task: Recall, steps: int, batch: int, rate: float, params: Any, skip: Any = None) -> Any:
        run = Stage(config.directory / name, steps, batch, rate, config.seed)
        identity = {"recipe": "retrieval", "stage": name}
        return train_stage(run, lm, task, params, identity=identity, config=config, mesh=mesh, skip=skip)

    params: Any = None
    for stage, steps, batch in zip(tasks, config.steps, config.batch_sizes, strict=True):
        params = train(f"grow-{stage.length}", stage, steps, batch, config.learning_rate, params)
        if params is None:
            return 1
    results: dict[str, Any] = {
        "command": command_line(), "machine": machine(), "config": to_json(config),
        "chance": 1 / task.num_values, "questions": config.test_rows * task.num_pairs, "arms": {},
    }  # fmt: skip
    path = config.results or config.directory / "results.json"
    answers = make_answers(lm, task)
    for name, skip in (("dense", None), ("aware", aware)):
        rate, batch = config.learning_rate / 3, config.batch_sizes[-1]
        tuned = train(name, task, config.tune_steps, batch, rate, params, skip)
        if tuned is None:
            return 1
        results["arms"][name] = test(answers, tuned, task, tile, config)
        results["seconds"] = time.perf_counter() - started
        path.write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(table(results)), flush=True)
    print(path)
    return 0


def recall_config(task: "Recall", dim: int, layers: int, **changes: Any) -> Any:
    """The small decoder that learns the task, heads of 64; `changes` are further fields of `QwenConfig`."""
    from jaxmodels.layers.rope import RopeConfig
    from jaxmodels.qwen.config import QwenConfig

    heads = dim // 64
    # A head must single out the token before, sharply: norms of queries and keys bound its scores, and with the usual
    # base of 1e6 few frequencies tell neighbours apart. With either the value behind a key was found late or never.
    fields: dict[str, Any] = {
        "vocab_size": task.vocab_size, "dim": dim, "layers": layers, "heads": heads, "kv_heads": max(1, heads // 2),
        "head_dim": 64, "mlp_dim": 2 * dim, "qk_norm": False, "rope": RopeConfig(theta=10_000.0), "tied_head": True,
        "max_positions": task.length,
    }  # fmt: skip
    return QwenConfig(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of a recipe of several."""

    directory: Path
    steps: int
    batch_size: int
    learning_rate: float
    seed: int


def train_stage(
    stage: Stage,
    lm: Any,
    task: "Recall",
    params: Any,
    *,
    identity: dict[str, Any],
    config: Any,
    mesh: Any,
    skip: "SkipAttention | None" = None,
    text: Any = None,
    compute_dtype: Literal["float32", "bfloat16"] | None = None,
) -> Any:
    """The weights after one run, from `params` or random ones; None when it was interrupted.

    `text` stands between the pairs and is learned too; what it is belongs into the `identity`.
    """
    from train.loop import fit, weights_of

    run = RunConfig(
        stage.directory, stage.steps, stage.batch_size, compute_dtype=compute_dtype, seed=stage.seed,
        log_every=max(1, stage.steps // 10), checkpoint_every=stage.steps,
    )  # fmt: skip
    optim = OptimConfig(stage.learning_rate, warmup_steps=min(100, stage.steps // 5), weight_decay=0.01)
    create = None if params is None else (lambda: params)
    identity = identity | {"task": to_json(task), "model": to_json(lm.config)}
    if skip is not None:
        identity["skip"] = to_json(dataclasses.asdict(skip))
    loss_fn = make_recall_loss(lm, task, skip, text=text is not None)
    result = fit(
        run, optim, mesh, weights_of(lm, mesh, create, seed=stage.seed), loss_fn,
        RecallRows(task, stage.batch_size, stage.seed, text), identity=identity, config=config,
    )  # fmt: skip
    return None if result.interrupted else result.state.params


def make_answers(lm: Any, task: "Recall") -> Any:
    """`answers(params, tokens, skip, mask)`, compiled: share of right answers `[B]`, tile pairs skipped and visited."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnames="mask")
    def answers(params, tokens, skip, mask):
        hidden = lm.hidden(params, tokens, mask=mask, skip=skip, skip_stats=skip is not None)
        said = jnp.argmax(lm.head(params, hidden.states[:, task.questions]), axis=-1)
        correct = (said == tokens[:, task.questions + 1]).mean(axis=1)
        stats = hidden.skip_stats
        return correct, (jnp.zeros(2) if stats is None else jnp.stack([stats.skipped.sum(), stats.visited.sum()]))

    return answers


def test(answers: Any, params: Any, task: "Recall", tile: Any, config: Retrieval) -> list[dict[str, Any]]:
    """One record per way of attending: accuracy with a 95 % interval over rows, and the share of skipped tiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.sparse_attention import SkipAttention
    from pallas_kernels.masks import Causal, SlidingWindow
    from train.loop import compute_dtype

    params = jax.tree.map(lambda x: x.astype(compute_dtype(None)), params)
    batch = config.batch_sizes[-1]
    rng = np.random.default_rng((config.seed, 2**31))
    batches = [task.rows(rng, batch) for _ in range(config.test_rows // batch)]

    def record(kind: str, value: float | int | None, skip: Any, mask: Any = Causal()) -> dict[str, Any]:
        pairs = [jax.device_get(answers(params, tokens, skip, mask)) for tokens in batches]
        rows = np.concatenate([correct for correct, _ in pairs])
        skipped, visited = np.sum([counts for _, counts in pairs], axis=0, dtype=np.float64)
        interval = 1.96 * rows.std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        sparsity = float(skipped / visited) if visited else 0.0
        return {
            "kind": kind, "value": value, "sparsity": sparsity, "accuracy": float(rows.mean()),
            "interval": float(interval),
        }  # fmt: skip

    records = [record("dense", None, None)]
    for threshold in THRESHOLDS:
        skip = SkipAttention.create(threshold=jnp.float32(threshold), tile=tile)
        records.append(record("skip", threshold, skip))
    # About half of the tiles, chosen by place: the first one and the latest.
    causal = Causal().schedule(task.length, task.length, tile.rows, tile.width).num_live
    window = max(tile.width, int(task.length * (1 - math.sqrt(0.5))) // tile.width * tile.width)
    mask = SlidingWindow(window, tile.width)
    live = mask.schedule(task.length, task.length, tile.rows, tile.width).num_live
    records.append(record("window", window, None, mask) | {"sparsity": 1 - live / causal})
    return records


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines of text."""
    lines = [f"accuracy of {results['questions']} answers (chance {results['chance']:.4f}), share of tiles skipped"]
    lines.append(f"{'':>18}" + "".join(f"{name + ' training':>32}" for name in results["arms"]))
    for records in zip(*results["arms"].values(), strict=True):
        first = records[0]
        name = first["kind"] if first["value"] is None else f"{first['kind']} {first['value']:g}"
        cells = (f"{r['accuracy']:.4f} ± {r['interval']:.4f} at {r['sparsity']:.3f}" for r in records)
        lines.append(f"{name:>18}" + "".join(f"{cell:>32}" for cell in cells))
    return lines
