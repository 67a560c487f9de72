"""What skipping tiles costs a language model on text: loss against the share of tiles that was really skipped.

    python -m benchmarks.skip_quality --model infer/assets/ar

Rows are the first tokens of held-out files of the demonstration corpus (the standard library that the shipped models
were trained on; these files were not), so the model must be one of those or know no such files either. Losses are
paired by row. The control is a window with the first tile, which visits as many tiles but chooses them by place.
"""

import argparse
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import write
from jaxmodels import load_pretrained
from jaxmodels.demo.corpus import load_corpus
from jaxmodels.sparse_attention import SkipAttention
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import Causal, SlidingWindow

THRESHOLDS = (1e-3, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="infer/assets/ar")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32, help="rows of text")
    parser.add_argument("--tile", type=int, nargs=2, default=(4, 8), help="rows and width of a tile")
    arguments = parser.parse_args()
    tile, length = SkipTile(*arguments.tile), arguments.length
    model = load_pretrained(arguments.model, dtype="float32")
    corpus = load_corpus()
    encoded = (
        model.tokenizer.encode(text)[:length] for path, text in corpus.texts.items() if corpus.splits[path] == "test"
    )
    rows = [row for row in encoded if len(row) == length][: arguments.rows]
    if len(rows) < arguments.rows:
        parser.error(f"only {len(rows)} held-out files have {length} tokens; got --rows {arguments.rows}")
    tokens = jnp.asarray(rows, jnp.int32)

    @functools.partial(jax.jit, static_argnames="mask")
    def losses(params, tokens, skip, mask):
        hidden = model.lm.hidden(params, tokens, mask=mask, skip=skip, skip_stats=skip is not None)
        logits = model.lm.head(params, hidden.states[:, :-1])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        stats = hidden.skip_stats
        counts = jnp.zeros(2) if stats is None else jnp.stack([stats.skipped.sum(), stats.visited.sum()])
        return nll.mean(axis=(1, 2)), counts

    def measure(skip, mask=Causal()) -> tuple[np.ndarray, float]:
        parts = [jax.device_get(losses(model.params, tokens[i : i + 4], skip, mask)) for i in range(0, len(rows), 4)]
        skipped, visited = np.sum([counts for _, counts in parts], axis=0, dtype=np.float64)
        return np.concatenate([loss for loss, _ in parts]), float(skipped / visited) if visited else 0.0

    dense, _ = measure(None)
    records = [{"kind": "dense", "sparsity": 0.0, "nll": float(dense.mean())}]

    def record(kind: str, value: float, loss: np.ndarray, sparsity: float) -> None:
        change = loss - dense
        interval = 1.96 * change.std(ddof=1) / math.sqrt(len(change))
        records.append(
            {
                "kind": kind, "value": value, "sparsity": sparsity, "nll": float(loss.mean()),
                "increase": float(change.mean()), "interval": float(interval),
            }
        )  # fmt: skip
        print(f"{kind} {value:g}: {sparsity:.3f} skipped, loss {change.mean():+.4f} ± {interval:.4f} nats", flush=True)

    print(f"dense: loss {dense.mean():.4f} nats per token, {len(rows)} rows of {length} tokens", flush=True)
    for threshold in THRESHOLDS:
        record("skip", threshold, *measure(SkipAttention.create(threshold=jnp.float32(threshold), tile=tile)))
    causal = Causal().schedule(length, length, tile.rows, tile.width).num_live
    for window in (length // 2, length // 4):
        mask = SlidingWindow(window, tile.width)
        live = mask.schedule(length, length, tile.rows, tile.width).num_live
        record("window", window, measure(None, mask)[0], 1 - live / causal)
    path = write("skip_quality", {"model": Path(arguments.model).name, "tile": arguments.tile, "records": records})
    print(path)


if __name__ == "__main__":
    main()
