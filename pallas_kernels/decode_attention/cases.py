"""Named shapes of real uses of `decode_attention`, for tests, compile reports and benchmarks alike."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """B batch, T new tokens, S cache slots of which `live` are in use, N query heads, K kv heads, H head dim."""

    name: str
    layers: int
    batch: int
    num_queries: int
    capacity: int
    live: int
    heads: int
    kv_heads: int
    head_dim: int


CASES = (
    Case("qwen2_5_0_5b_step", 24, 1, 1, 512, 300, 14, 2, 64),
    Case("qwen2_5_0_5b_step_long", 24, 1, 1, 2048, 2000, 14, 2, 64),
    Case("qwen2_5_0_5b_step_batch_8", 24, 8, 1, 512, 300, 14, 2, 64),
    Case("qwen2_5_0_5b_block_32", 24, 1, 32, 512, 300, 14, 2, 64),
    Case("qwen3_8b_step", 36, 1, 1, 8448, 8192, 32, 8, 128),
    Case("qwen3_8b_block_32", 36, 1, 32, 8448, 8192, 32, 8, 128),
    Case("qwen3_8b_fused_64", 36, 1, 64, 8448, 8192, 32, 8, 128),
)
