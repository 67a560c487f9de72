"""Writes block_diffusion.npz: loss and gradients of the block-diffusion objective from torch autograd.

    python tests/train/objectives/goldens/make_goldens.py

needs torch and transformers (made with torch 2.13 and transformers 5.23, CPU, float32, sdpa). The model is the golden
Qwen3 of tests/jaxmodels/goldens. Content: tokens, masked [2, L], level [2, L], block, mask_id; loss, the sum over
masked tokens of cross-entropy / level divided by 2 L; grad/<parameter name>.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

HERE = Path(__file__).parent
LENGTH, BLOCK, MASK_ID = 14, 4, 5


def main() -> None:
    generator = torch.Generator().manual_seed(11)
    model = Qwen3ForCausalLM.from_pretrained(
        HERE.parents[2] / "jaxmodels/goldens/qwen3", attn_implementation="sdpa", dtype=torch.float32
    )
    tokens = torch.randint(6, model.config.vocab_size, (2, LENGTH), generator=generator)
    level = torch.rand(2, -(-LENGTH // BLOCK), generator=generator).clamp(min=0.2).repeat_interleave(BLOCK, 1)
    level = level[:, :LENGTH]
    masked = torch.rand(2, LENGTH, generator=generator) < level
    index = torch.arange(2 * LENGTH)
    clean, block = index >= LENGTH, (index % LENGTH) // BLOCK
    q_clean, k_clean, q_block, k_block = clean[:, None], clean[None], block[:, None], block[None]
    allowed = ~q_clean & ~k_clean & (q_block == k_block)
    allowed |= ~q_clean & k_clean & (q_block > k_block)
    allowed |= q_clean & k_clean & (q_block >= k_block)
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, -1, -1, -1)
    inputs = torch.cat([torch.where(masked, MASK_ID, tokens), tokens], 1)
    positions = torch.arange(LENGTH).repeat(2)[None].expand(2, -1)
    logits = model(inputs, attention_mask=additive, position_ids=positions, use_cache=False).logits[:, :LENGTH]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    loss = (nll.view(2, LENGTH) * masked / level).sum() / tokens.numel()
    loss.backward()
    out = {"tokens": tokens, "masked": masked, "level": level, "loss": loss.detach()}
    out |= {"block": torch.tensor(BLOCK), "mask_id": torch.tensor(MASK_ID)}
    out |= {f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
    np.savez_compressed(HERE / "block_diffusion.npz", **{k: v.numpy() for k, v in out.items()})


if __name__ == "__main__":
    main()
