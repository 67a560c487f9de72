"""What keys and values in eight bits cost the shipped autoregressive model, in bits per byte of held-out text.

    python -m benchmarks.kv_cache_quality --output runs/kv_cache.json

Rows of test files are read in pieces through a cache: every piece sees the pieces before it as the cache holds them and
itself as it is. Scales of "fp8 calibrated" are the largest magnitude of each layer's keys and values in training files
over 448. Differences are paired by row.
"""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quantization_quality import MODEL, SEQ_LEN, interval
from jaxmodels import load_pretrained
from jaxmodels.cache import KVCache, KVCodes, Scales
from jaxmodels.demo.corpus import load_corpus
from train.data import RowStore, StoreConfig
from train.data.corpus import open_or_build_corpus
from train.machine import command_line, machine
from train.recipes.paroquant import choose_rows


@functools.partial(jax.jit, static_argnames=("lm", "form", "piece"))
def nats(params: Any, tokens: jax.Array, scales: Scales | None, *, lm: Any, form: str | None, piece: int) -> jax.Array:
    """Sum over rows `[B, T]` of -log p of each token that follows another, `[B]`; documents are not kept apart."""
    codes = None if form is None else KVCodes(form, scales)  # type: ignore[arg-type]
    cache = KVCache.init(lm.config, batch=len(tokens), capacity=tokens.shape[1], dtype=jnp.float32, codes=codes)

    def step(cache, part):
        hidden = lm.hidden(params, part, cache=cache)
        return cache.append(hidden.kv), lm.head(params, hidden.states)

    pieces = tokens.reshape(len(tokens), -1, piece).swapaxes(0, 1)
    _, logits = jax.lax.scan(step, cache, pieces)
    logits = logits.swapaxes(0, 1).reshape(*tokens.shape, -1)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -found[..., 0].sum(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/kv_cache.json"))
    parser.add_argument("--store", type=Path, default=Path("runs/kv_cache_rows"))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--piece", type=int, default=16)
    args = parser.parse_args()

    model = load_pretrained(MODEL)
    lm, tokenizer = model.lm, model.tokenizer
    assert tokenizer is not None
    params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    settings = StoreConfig(SEQ_LEN, lm.config.eos_ids[0])
    store = open_or_build_corpus(args.store, load_corpus(), tokenizer.backend, settings)
    test = choose_rows(RowStore(store, "test"), args.rows, 0, "rows")["tokens"]
    train = choose_rows(RowStore(store, "train"), 64, 0, "rows")["tokens"]
    kv = jax.jit(functools.partial(lm.hidden, return_kv=True))(params, jnp.asarray(train)).kv
    assert kv is not None
    largest = Scales(*(jnp.abs(x).max(axis=(1, 2, 3, 4)) / 448 for x in kv))
    num_bytes = np.array([len(tokenizer.decode(list(map(int, row[1:]))).encode()) for row in test])

    arms: dict[str, tuple[str | None, Scales | None]] = {
        "float32": (None, None), "int8": ("int8", None), "fp8": ("fp8", None), "fp8 calibrated": ("fp8", largest),
    }  # fmt: skip
    bits, results = {}, {}
    for name, (form, scales) in arms.items():
        parts = [
            nats(params, jnp.asarray(test[i : i + 32]), scales, lm=lm, form=form, piece=args.piece)
            for i in range(0, len(test), 32)
        ]
        bits[name] = np.concatenate(parts) / math.log(2)
        results[name] = {
            "bits_per_byte": interval(bits[name], num_bytes),
            "minus_float32": interval(bits[name] - bits["float32"], num_bytes),
        }
        print(name, results[name], flush=True)
    result = {
        "command": command_line(), **machine(), "rows": len(test), "tokens": int(test.size),
        "bytes": int(num_bytes.sum()),
        "scales": {"k": np.asarray(largest.k).tolist(), "v": np.asarray(largest.v).tolist()}, "arms": results,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main()
