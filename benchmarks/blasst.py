"""Skip-softmax attention on a GPU: decisions and outputs of the XLA path, then the retrieval recipe.

    python -m benchmarks.blasst --out DIR [--lengths 64 512 2048 ...]

Needs neither grain nor tyro. Writes check.json, results.json and the metrics of each stage to DIR as they come, so
that a run that is cut off still tells something. Checkpoints go to a scratch directory.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import environment
from pallas_kernels import flash_attention
from pallas_kernels.attention import reference, skip, xla
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import Causal
from train.recipes.retrieval import Retrieval
from train.recipes.retrieval import main as retrieval


def check() -> list[dict]:
    """XLA path against the definition: bfloat16, real tile; a decision may differ only next to the threshold."""
    rng = np.random.default_rng(0)
    batch, length, heads, kv_heads, head_dim, tile = 2, 2048, 8, 2, 128, SkipTile()
    q = jnp.asarray(rng.normal(size=(batch, length, heads, head_dim)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(batch, length, kv_heads, head_dim)), jnp.bfloat16) for _ in range(2))
    weight = jnp.asarray(rng.choice([0.3, 1.0, 2.0], (1, length // 128, 1, 1)).repeat(128, axis=1), jnp.bfloat16)
    k = k * weight  # some tiles matter and some do not
    seen = reference.visible(Causal(), Limits(), length, length)
    scores = jax.jit(reference.visible_scores, static_argnums=3)(q, k, seen, head_dim**-0.5)
    margins = skip.margins(skip.tile_tops(scores.reshape(batch, heads, length, length), tile))
    records = []
    for threshold in (1e-3, 0.1, 0.5):
        run = functools.partial(
            flash_attention, skip_threshold=threshold, skip_tile=tile, return_stats=True, return_selection=True
        )
        out, stats, keep = jax.jit(run)(q, k, v)
        wanted = skip.keeps(margins, jnp.log(jnp.float32(threshold)))
        off = np.abs(np.asarray(margins) - np.log(threshold))[np.asarray(keep != wanted)]
        kept = skip.per_pair(keep, tile, length, length)
        expected, _ = jax.jit(reference.attend, static_argnums=4)(q, k, v, seen, head_dim**-0.5, kept)
        error = jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32)).max()
        visited = int(xla.visited_tiles(Causal(), Limits(), batch, length, length, tile)[0])
        records.append(
            {
                "threshold": threshold, "skipped": int(stats.skipped.sum()), "visited": int(stats.visited.sum()),
                "decisions_that_differ": int(off.size), "their_largest_distance": float(off.max(initial=0.0)),
                "error_at_equal_decisions": float(error),
            }
        )  # fmt: skip
        assert int(stats.visited[0, 0]) == visited and off.max(initial=0.0) < 2e-2 and float(error) < 3e-2, records[-1]
        print("check", records[-1], flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(Retrieval):
        if field.name not in ("directory", "results"):
            many = isinstance(field.default, tuple)
            kind = type(field.default[0]) if many else type(field.default)
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=kind, nargs="+" if many else None, default=field.default)
    options = vars(parser.parse_args())
    out = options.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    record = {"environment": environment(), "check": check()}
    (out / "check.json").write_text(json.dumps(record, indent=1))
    print(f"checked in {time.perf_counter() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        config = Retrieval(directory=Path(scratch), results=out / "results.json", **options)
        try:
            retrieval(config)
        finally:
            for metrics in Path(scratch).glob("*/metrics.jsonl"):
                shutil.copy(metrics, out / f"{metrics.parent.name}.jsonl")


if __name__ == "__main__":
    main()
