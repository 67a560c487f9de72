"""Named shapes of real uses of `flash_attention`, for tests, compile reports and benchmarks alike."""

import dataclasses

from pallas_kernels.masks import BlockDiffusion, Causal, Full, Mask, SlidingWindow


@dataclasses.dataclass(frozen=True)
class Case:
    """B batch, T queries, S keys, N query heads, K kv heads, H head dim."""

    name: str
    batch: int
    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask


CASES = (
    # Training the small shipped models on a CPU.
    Case("tiny_causal_128", 16, 128, 128, 8, 4, 64, Causal()),
    Case("tiny_causal_256", 8, 256, 256, 8, 4, 64, Causal()),
    Case("tiny_doubled_256", 8, 512, 512, 8, 4, 64, BlockDiffusion(256, 16)),
    # GPT-2 small.
    Case("gpt2_causal_512", 4, 512, 512, 12, 12, 64, Causal()),
    # Qwen2.5-0.5B, Qwen2.5-1.5B and Qwen3-8B.
    Case("qwen2_5_0_5b_causal_2048", 1, 2048, 2048, 14, 2, 64, Causal()),
    Case("qwen2_5_1_5b_doubled_2048", 1, 4096, 4096, 12, 2, 128, BlockDiffusion(2048, 16)),
    Case("qwen3_8b_causal_8192", 1, 8192, 8192, 32, 8, 128, Causal()),
    Case("qwen3_8b_doubled_4096", 1, 8192, 8192, 32, 8, 128, BlockDiffusion(4096, 64)),
    Case("qwen3_8b_embed_4096", 1, 4096, 4096, 32, 8, 128, Full()),
    Case("qwen3_8b_window_8192", 1, 8192, 8192, 32, 8, 128, SlidingWindow(1024, 4)),
)
