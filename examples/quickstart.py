# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxstream: from an autoregressive to a block-diffusion language model
#
# The project ships two small models of Python code: one writes a token per forward pass, the other was made from it
# and fills in a block of masked tokens, several per pass. This notebook streams from both, looks at the trade-off,
# checks that the cache changes nothing, and runs the first steps of a conversion.
#
# Everything is toy-sized and runs in about a minute on two CPU cores; a GPU is used when JAX sees one. The method is
# described in `docs/efficient_dlm.md`, the models in `docs/shipped_models.md`.

# %% tags=["install"]
# ruff: noqa: E402, RUF100 (as a script, cells import after the first code)
# Only where the project is not installed yet, for instance in Colab after cloning it: needs Python 3.12 or newer.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("jaxmodels") is None:
    checkout = next((d for d in (Path.cwd(), *Path.cwd().parents) if (d / "pyproject.toml").is_file()), None)
    if checkout is None:
        raise FileNotFoundError("open this notebook inside a checkout of the project: no pyproject.toml above it")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", "."], cwd=checkout, check=True)
    sys.path.insert(0, str(checkout))  # an editable install is seen by the next interpreter only

# %% tags=["parameters"]
PROMPTS = 4  # real: 16 here; 2048 in `python -m infer completions`
PROMPT_TOKENS = 128  # real: 256
NEW_TOKENS = 64  # real: 128
THRESHOLDS = (0.95, 0.9, 0.7, 0.5)  # real: (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
TRAIN_STEPS = 20  # real: 5000
TRAIN_ROWS, TRAIN_LENGTH = 4, 64  # real: 64 rows of 512 tokens
LEARNING_RATE = 1e-3  # real: 1e-3 for this model, 1e-5 for a pretrained Qwen

# %% [markdown]
# ## What this machine offers
# The same report as `python -m infer env`: versions, devices, and which kernels a call gets, or why not.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from infer import env

env.main(env.Env())

# %% [markdown]
# ## Load
# `load_pretrained` reads a directory in the Hugging Face layout. Weights are a plain nested dictionary, the model is a
# set of pure functions (`lm.apply`, `lm.hidden`, `lm.head`). CPUs compute bfloat16 slowly, hence float32 there.

# %%
import infer
from jaxmodels import load_pretrained

ASSETS = Path(infer.__file__).parent / "assets"
dtype = "float32" if jax.default_backend() == "cpu" else None
ar, dlm = (load_pretrained(ASSETS / name, dtype=dtype) for name in ("ar", "dlm"))
tokenizer = dlm.tokenizer
BLOCK = dlm.config.block_size
parameters = sum(leaf.size for leaf in jax.tree.leaves(dlm.params))
print(f"{parameters / 1e6:.1f} M parameters each, {dlm.config.layers} layers, blocks of {BLOCK} tokens")

# %% [markdown]
# ## Stream, one token at a time
# The prompts are pieces of standard-library files that neither model has seen in training.

# %%
from infer.quickstart import load_prompts
from infer.text.engine import TextEngine
from infer.text.requests import Request

prompts, _ = load_prompts(tokenizer, PROMPTS, max_tokens=PROMPT_TOKENS, multiple=BLOCK, directory=None)
capacity = PROMPT_TOKENS + NEW_TOKENS
autoregressive = TextEngine.from_pretrained(ar, capacity=capacity, chunk=BLOCK)


def request(prompt, **options):
    return Request(ids=tuple(prompt.ids), max_new_tokens=NEW_TOKENS, temperature=0.0, options=options)


print(prompts[0].cut.path)
print(tokenizer.decode(prompts[0].ids[-48:]), end="")
print("\x1b[34m", end="")
for event in autoregressive.generate([request(prompts[0])]):
    print(event.text, end="", flush=True)
print("\x1b[0m")
print(f"{event.usage.new_tokens} tokens in {event.usage.forwards + 1} forwards, {event.finish_reason}")

# %% [markdown]
# ## Stream, block by block
# The other model starts each block from masks only. A pass proposes a token for every mask; those with at least the
# threshold's confidence are kept, and always the surest one. Each event is a finished block; its `reveal` tells the
# pass in which each token was fixed. Tokens that shared a pass are green.

# %%
from collections import Counter

diffusion = TextEngine.from_pretrained(dlm, capacity=capacity, diffusion={})

print(tokenizer.decode(prompts[0].ids[-48:]), end="")
for event in diffusion.generate([request(prompts[0], threshold=0.9)]):
    together = Counter(event.reveal)
    for token, number in zip(event.tokens, event.reveal, strict=True):
        print("\x1b[32m" if together[number] > 1 else "\x1b[0m", tokenizer.decode([token]), sep="", end="")
    print("\x1b[0m", end="", flush=True)
print()
print(f"{event.usage.new_tokens} tokens in {event.usage.forwards} forwards, {event.finish_reason}")

# %% [markdown]
# ## One knob: the threshold
# It is an ordinary value of the request, so nothing compiles again. A forward is any pass that reveals or commits
# tokens. What a lower threshold costs in quality needs many prompts: `docs/shipped_models.md` has it.

# %%
tokens_per_forward = {}
for threshold in (1.0, *THRESHOLDS):
    done = diffusion.complete([request(prompt, threshold=threshold) for prompt in prompts])
    forwards = sum(completion.usage.forwards for completion in done)
    tokens_per_forward[threshold] = sum(completion.usage.new_tokens for completion in done) / forwards
assert all(value >= 0.8 for value in tokens_per_forward.values())
assert tokens_per_forward[min(THRESHOLDS)] > tokens_per_forward[1.0]

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(list(tokens_per_forward), list(tokens_per_forward.values()), "o-", label="block diffusion")
axes.axhline(1.0, color="0.5", linestyle="--", label="autoregressive")
axes.invert_xaxis()
axes.set(
    xlabel="confidence threshold", ylabel="tokens per forward", title=f"{PROMPTS} prompts, {NEW_TOKENS} tokens each"
)
axes.legend()
plt.show()

# %% [markdown]
# ## The mask behind it
# In training a row of L tokens enters twice: a noisy copy with masks and a clean copy. A noisy token sees its own
# noisy block and the clean blocks before it; a clean token sees the clean blocks up to its own. Here L = 16 in blocks
# of 4. Kernels never build this picture; they visit the live tiles only.

# %%
from pallas_kernels.masks import BlockCausal, BlockDiffusion, Full

length, block = 16, 4
mask = BlockDiffusion(length, block)
dense = mask.dense(2 * length, 2 * length)
assert dense.mean() == 1 / 4 + block / (4 * length)  # the density is exact

figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.imshow(dense, cmap="Greys", vmax=1.4)
halves = [length / 2 - 0.5, 3 * length / 2 - 0.5]
axes.set_xticks(halves, ["noisy keys", "clean keys"])
axes.set_yticks(halves, ["noisy queries", "clean queries"], rotation=90, va="center")
for edge in np.arange(block, 2 * length, block) - 0.5:
    axes.axhline(edge, color="tab:blue", linewidth=1.5 if edge == length - 0.5 else 0.3)
    axes.axvline(edge, color="tab:blue", linewidth=1.5 if edge == length - 0.5 else 0.3)
plt.show()

# %% [markdown]
# ## Cached = uncached
# Decoding reads old blocks from a KV cache. A pass over a block of masks with the cache must give the logits of a pass
# over prompt and block together under the block-causal mask.

# %%
from jaxmodels.cache import KVCache

lm, params = dlm.lm, dlm.params
prompt = jnp.asarray([prompts[0].ids])
masks = jnp.full((1, BLOCK), dlm.config.mask_id)


@jax.jit
def uncached(params):
    logits = lm.apply(params, jnp.concatenate([prompt, masks], axis=1), mask=BlockCausal(BLOCK))
    return logits[:, -BLOCK:]


@jax.jit
def cached(params):
    prefill = lm.hidden(params, prompt, mask=BlockCausal(BLOCK), return_kv=True)
    cache = KVCache.init(lm.config, batch=1, capacity=capacity, dtype=params["embed"].dtype).append(prefill.kv)
    block = lm.hidden(params, masks, cache=cache, own_mask=Full())  # reads the cache, writes nothing
    return lm.head(params, block.states)


difference = float(jnp.abs(uncached(params) - cached(params)).max())
print(f"largest difference of {BLOCK} x {dlm.config.vocab_size} logits: {difference:.1e}")
assert difference < (1e-4 if params["embed"].dtype == jnp.float32 else 0.5)

# %% [markdown]
# ## Convert
# The conversion goes on training the autoregressive weights under the doubled mask; no parameter is added. Below are
# its first steps, on a few rows of one file. The bound is the unbiased likelihood bound in nats per token: the training
# loss itself is reweighted and is no likelihood. So few rows are learned by heart at once; the bound that
# counts is that of held-out text (`docs/shipped_models.md`).

# %%
import textwrap
import time

from jaxmodels.qwen import build
from train.config import OptimConfig
from train.objectives.block_diffusion import make_block_diffusion_loss, make_bound_loss
from train.objectives.config import DiffusionObjective
from train.optimizers import make_optimizer
from train.state import TrainState
from train.step import make_train_step

start = build(dlm.config)  # the same network; its configuration names the mask token and the block
shape = (TRAIN_ROWS, TRAIN_LENGTH)
ids = tokenizer.encode(Path(textwrap.__file__).read_text("utf-8"))[: TRAIN_ROWS * TRAIN_LENGTH]
batch = {
    "tokens": jnp.asarray(ids, jnp.int32).reshape(shape),
    "segment_ids": jnp.ones(shape, jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(TRAIN_LENGTH), shape),
    "loss_mask": jnp.ones(shape, bool),
}
objective = DiffusionObjective(block_size=BLOCK, half_life_ratio=0.1)
optimizer, schedule = make_optimizer(OptimConfig(learning_rate=LEARNING_RATE, warmup_steps=2), TRAIN_STEPS)
step = make_train_step(make_block_diffusion_loss(start, objective), optimizer, schedule=schedule)
bound = jax.jit(make_bound_loss(start, block_size=BLOCK, num_samples=2))


def nats_per_token(params):
    total, count, _ = bound(params, batch, jax.random.key(1))
    return float(total / count)


masters = jax.tree.map(lambda x: x.astype(jnp.float32), ar.params)
before = nats_per_token(masters)
state = TrainState.create(jax.tree.map(jnp.copy, masters), optimizer, jax.random.key(0))  # the step takes its buffers
losses, began = [], time.perf_counter()
for _ in range(TRAIN_STEPS):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
after = nats_per_token(state.params)
print(f"{TRAIN_STEPS} steps in {time.perf_counter() - began:.1f} s, compilation included")
print(
    f"bound on these rows: {before:.2f} before, {after:.2f} after; the shipped model: {nats_per_token(dlm.params):.2f}"
)
assert np.isfinite(losses).all() and after < before

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(losses)
axes.set(xlabel="step", ylabel="training loss", title="first steps of a conversion")
plt.show()

# %% [markdown]
# ## Go on
# - `python -m infer quickstart`: this comparison with timing, and a picture of speed against quality.
# - `python -m train quickstart`: corpus, tokenizer, autoregressive training, conversion, evaluation; six minutes.
# - Your own model:
#
#       python -m train dlm --init DIR --data FILES --mask-id ID --directory runs/mine --steps 2000
#       python -m infer text --model runs/mine/model --prompt "def fibonacci(n):" --threshold 0.9
