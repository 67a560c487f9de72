"""Writes the golden models of this folder with transformers: tiny, random, every option of the Qwen family.

    python tests/jaxmodels/goldens/make_goldens.py [NAME ...]

needs torch and transformers (made with torch 2.13 and transformers 5.23, CPU, float32, sdpa). Each golden is a real
Hugging Face directory, written by `save_pretrained`, plus `outputs.npz`:

    tokens [B, T], lengths [B]        right-padded prompts
    logits [B, T, V]                  of the unpadded rows; padding is 0
    layers [L + 1, B, T, D]           embeddings and the output of each block, before the final norm
    states [B, T, D]                  after the final norm
    greedy [B, G]                     greedy continuation of each row by itself, from a cached `generate`
    packed_tokens, packed_segments, packed_positions [1, P], packed_logits [1, P, V]  documents side by side
    doubled_tokens [1, 2 L], doubled_logits [1, 2 L, V], doubled_block    the block-diffusion mask over [noisy ; clean]
    loss, grad/<parameter name>       mean cross-entropy of the next token over row 0, and its gradient
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = Path(__file__).resolve().parent
SIZES = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
THETA = {"rope_theta": 10_000.0}
GOLDENS = {
    # Qwen2: biases; heads fill the width. Qwen3: norms of queries and keys; head_dim apart from width / heads.
    "qwen2_tied": (
        Qwen2Config,
        dict(tie_word_embeddings=True, rope_parameters=THETA | {"rope_type": "default"}),
    ),
    "qwen2_linear_window": (
        Qwen2Config,
        dict(
            rope_parameters=THETA | {"rope_type": "linear", "factor": 4.0},
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    "qwen3": (Qwen3Config, dict(head_dim=16, rope_parameters=THETA | {"rope_type": "default"})),
    "qwen3_tied_yarn": (
        Qwen3Config,
        dict(
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters=THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ),
    "qwen3_yarn_mscale": (
        Qwen3Config,
        dict(
            head_dim=16,
            num_hidden_layers=2,
            rope_parameters=THETA
            | {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "truncate": False,
            },
        ),
    ),
    # Prompts of the dynamic model are shorter and longer than its 16 trained positions.
    "qwen3_dynamic": (
        Qwen3Config,
        dict(
            head_dim=16,
            max_position_embeddings=16,
            num_hidden_layers=2,
            rope_parameters=THETA | {"rope_type": "dynamic", "factor": 3.0},
        ),
    ),
    "qwen3_alternating_window": (
        Qwen3Config,
        dict(
            head_dim=16,
            num_hidden_layers=4,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention"] * 2,
            rope_parameters=THETA | {"rope_type": "default"},
        ),
    ),
}
EXPERTS = dict(head_dim=16, num_hidden_layers=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
MOE = {
    "qwen3_moe": dict(norm_topk_prob=True, rope_parameters=THETA | {"rope_type": "default"}),
    # the weights of a token's experts are what the softmax over all of them says
    "qwen3_moe_tied": dict(
        norm_topk_prob=False, tie_word_embeddings=True, rope_parameters=THETA | {"rope_type": "default"}
    ),
}
GOLDENS |= {name: (Qwen3MoeConfig, EXPERTS | options) for name, options in MOE.items()}
LENGTHS = (23, 9)  # one row longer than every window and the dynamic model's trained length, one shorter
NEW_TOKENS = 12
DOUBLED_LENGTH, DOUBLED_BLOCK = 11, 4  # the last block is short
SEGMENTS = (7, 10)


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of order 1 in effect; norms and biases random, because ones and zeros hide mix-ups."""
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name:  # a tied one is the head as well
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if tied else 1.0))
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def additive(allowed: torch.Tensor) -> torch.Tensor:
    """Float 4-D mask `[1, 1, Q, K]`: 0 where allowed, the lowest float elsewhere."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]


def doubled_mask(length: int, block: int) -> torch.Tensor:
    """[noisy ; clean]: own noisy block, strictly earlier clean blocks; clean is block-causal."""
    index = torch.arange(2 * length)
    clean, number = index >= length, (index % length) // block
    q_clean, k_clean, q_number, k_number = clean[:, None], clean[None], number[:, None], number[None]
    noisy = ~q_clean & ~k_clean & (q_number == k_number)
    cross = ~q_clean & k_clean & (q_number > k_number)
    return noisy | cross | (q_clean & k_clean & (q_number >= k_number))


def forward(model: torch.nn.Module, tokens: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
    """Logits, normed states, and the raw output of every block, collected by hooks."""
    outputs = [model.model.embed_tokens(tokens)]
    hooks = [layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for layer in model.model.layers]
    normed = []
    hooks.append(model.model.norm.register_forward_hook(lambda _m, _a, output: normed.append(output)))
    logits = model(tokens, use_cache=False, **kwargs).logits
    for hook in hooks:
        hook.remove()
    return logits, normed[0], torch.stack(outputs)


def stored(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """What files call a parameter: experts, which the model holds in two arrays, one by one."""
    base, _, kind = key.rpartition(".")
    if kind == "gate_up_proj":
        gate, up = value.chunk(2, dim=1)
        return stored(f"{base}.gate_proj", gate) | stored(f"{base}.up_proj", up)
    if base.endswith(".experts"):
        return {f"{base}.{e}.{kind}.weight": own for e, own in enumerate(value)}
    return {key: value}


def make(name: str, seed: int) -> None:
    config_class, options = GOLDENS[name]
    generator = torch.Generator().manual_seed(seed)
    config = config_class(**(SIZES | options), attn_implementation="sdpa", dtype="float32")
    model_class = {
        Qwen2Config: Qwen2ForCausalLM, Qwen3Config: Qwen3ForCausalLM, Qwen3MoeConfig: Qwen3MoeForCausalLM
    }[config_class]  # fmt: skip
    model = model_class(config).eval()
    randomise(model, generator)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)

    draw = lambda *shape: torch.randint(0, config.vocab_size, shape, generator=generator)  # noqa: E731
    tokens = draw(len(LENGTHS), max(LENGTHS))
    out: dict[str, np.ndarray] = {}
    with torch.no_grad():
        rows = [forward(model, tokens[b : b + 1, :length]) for b, length in enumerate(LENGTHS)]
        greedy = [
            model.generate(
                tokens[b : b + 1, :length],
                attention_mask=torch.ones(1, length, dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, length:]
            for b, length in enumerate(LENGTHS)
        ]
        pad = lambda x, axis, length: torch.nn.functional.pad(  # noqa: E731
            x, [0, 0] * (x.ndim - 1 - axis) + [0, max(LENGTHS) - length]
        )
        logits, states, layers = (
            torch.cat([pad(row[i], axis, length) for row, length in zip(rows, LENGTHS, strict=True)], axis - 1)
            for i, axis in ((0, 1), (1, 1), (2, 2))
        )
        out |= dict(tokens=tokens, lengths=torch.tensor(LENGTHS), logits=logits, states=states, layers=layers)
        out |= dict(greedy=torch.stack(greedy))

        # One mask for all layers; the class of mixtures of experts has no other kind of layer.
        if getattr(config, "layer_types", None) in (None, ["full_attention"] * config.num_hidden_layers):
            packed = draw(1, sum(SEGMENTS))
            segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(SEGMENTS)])
            positions = torch.cat([torch.arange(n) for n in SEGMENTS])[None]
            index = torch.arange(sum(SEGMENTS))
            allowed = (segments[:, None] == segments[None]) & (index[:, None] >= index[None])
            packed_logits, *_ = forward(model, packed, attention_mask=additive(allowed), position_ids=positions)
            out |= dict(packed_tokens=packed, packed_segments=segments[None], packed_positions=positions)
            out |= dict(packed_logits=packed_logits)

            doubled = draw(1, 2 * DOUBLED_LENGTH)
            positions = torch.arange(DOUBLED_LENGTH).repeat(2)[None]
            mask = additive(doubled_mask(DOUBLED_LENGTH, DOUBLED_BLOCK))
            doubled_logits, *_ = forward(model, doubled, attention_mask=mask, position_ids=positions)
            out |= dict(doubled_tokens=doubled, doubled_logits=doubled_logits)
            out |= dict(doubled_block=torch.tensor(DOUBLED_BLOCK))

    row = tokens[:1, : LENGTHS[0]]
    logits = model(row, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:])
    loss.backward()
    out["loss"] = loss.detach()
    for key, parameter in model.named_parameters():
        out |= {f"grad/{name}": part for name, part in stored(key, parameter.grad).items()}
    arrays = {key: value.numpy() for key, value in out.items()}
    arrays = {key: value.astype(np.int32) if value.dtype.kind == "i" else value for key, value in arrays.items()}
    np.savez_compressed(folder / "outputs.npz", **arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {size / 1e3:.0f} kB, loss {out['loss']:.3f}, files {sorted(p.name for p in folder.iterdir())}")


if __name__ == "__main__":
    for number, golden in enumerate(GOLDENS):
        if golden in (sys.argv[1:] or GOLDENS):
            make(golden, seed=number)
