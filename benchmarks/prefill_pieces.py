"""Milliseconds to read a long prompt in one piece or in pieces through the cache, and to decode behind it.

    python -m benchmarks.prefill_pieces --preset qwen3_0_6b --length 32768 --pieces 32768 8192 2048

Random bfloat16 weights, batch 1. A row is a setting of `ARDecoder`: pieces into a growing cache (`--prefill-chunk`),
or into sinks and a ring (`--window`). Times are from dispatch to the result on the host, median of the repeats; memory
is the peak of the process so far, so rows go from small to large. Before any timing a small float32 model must give the
same tokens in pieces, in one piece and with a window that holds everything.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from infer.text.decoders import ARDecoder
from infer.text.events import Job
from jaxmodels import qwen
from jaxmodels.decoding.sampling import SamplingOptions

NEW = 64


def job(prompt: np.ndarray) -> Job:
    return Job(prompt=prompt, max_new_tokens=NEW, sampling=SamplingOptions(), eos_ids=())


def tokens_of(decoder: ARDecoder, prompt: np.ndarray, steps: int) -> list[int]:
    """The first tokens after a prompt."""
    chunks = [decoder.start([0], [job(prompt)])]
    chunks += [decoder.advance(np.ones(1, bool)) for _ in range(steps)]
    return [int(np.asarray(chunk.tokens)[0, 0]) for chunk in chunks]


def check() -> None:
    """Pieces give the tokens of one piece, and a window as long as everything those of a growing cache."""
    lm = qwen.build(qwen.QwenConfig.tiny(max_positions=1024))
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, jax.jit(lm.init)(jax.random.key(0)))
    prompt = np.random.default_rng(0).integers(3, lm.config.vocab_size, 300).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        once = tokens_of(ARDecoder(lm, params, capacity=400), prompt, 20)
        pieces = tokens_of(ARDecoder(lm, params, capacity=400, prefill_chunk=64), prompt, 20)
        window = tokens_of(ARDecoder(lm, params, window=400, prefill_chunk=64), prompt, 20)
    if not once == pieces == window:
        raise SystemExit(f"tokens differ: {once} in one piece, {pieces} in pieces, {window} with a window")
    print(f"tokens agree in one piece, in pieces and with a window: {once[:8]} ...", flush=True)


def measure(lm, params, prompt: np.ndarray, repeats: int, **options) -> dict[str, float]:
    decoder = ARDecoder(lm, params, **options)
    started = time.perf_counter()
    decoder.warm([len(prompt)])
    row = {"compile_seconds": time.perf_counter() - started}
    prefill, decode = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(decoder.start([0], [job(prompt)]).tokens)
        prefill.append(time.perf_counter() - started)
        for _ in range(NEW // 4):
            started = time.perf_counter()
            jax.block_until_ready(decoder.advance(np.ones(1, bool)).tokens)
            decode.append(time.perf_counter() - started)
    peak = jax.devices()[0].memory_stats() or {}
    row["peak_gib"] = peak.get("peak_bytes_in_use", 0) / 2**30  # of the process so far: rows go from small to large
    return row | {"prefill": report.spread(prefill), "decode": report.spread(decode)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3_0_6b", help="classmethod of QwenConfig")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--pieces", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--windows", type=int, nargs="*", default=[4096])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    check()
    lm = qwen.build(getattr(qwen.QwenConfig, arguments.preset)())
    params = jax.jit(lm.init, static_argnums=1)(jax.random.key(0), jnp.dtype(jnp.bfloat16))
    prompt = np.random.default_rng(0).integers(0, lm.config.vocab_size, arguments.length).astype(np.int32)
    record = report.Record("prefill_pieces", preset=arguments.preset, length=arguments.length)
    settings = [{"window": window} for window in arguments.windows]
    settings += [{"capacity": arguments.length + NEW, "prefill_chunk": piece} for piece in arguments.pieces]
    for options in settings:
        row = options | measure(lm, params, prompt, arguments.repeats, **options)
        record.add(row)
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        print(
            f"{name:40s} prefill {row['prefill']['median_ms']:9.1f} ms  decode {row['decode']['median_ms']:7.2f} ms  "
            f"peak {row['peak_gib']:.1f} GiB  compile {row['compile_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
