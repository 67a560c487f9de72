"""Released block-diffusion models and their relatives, as data.

Everything that differs between them is configuration: training recipe, mask token, alignment, decoding rule.
Sources: arXiv 2512.14067 (Efficient-DLM), 2509.26328 (Fast-dLLM v2), 2510.06303 (SDAR), 2508.15487 (Dream),
2502.09992 (LLaDA), and their published checkpoints. None: not published, or left to the checkpoint.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """One model.

    Attributes:
        init_from: Hugging Face name of the autoregressive model it was made from.
        pattern: attention pattern in training.
        train_block: training block in tokens; None without blocks.
        eval_block: block length it is decoded with.
        half_life_ratio: lambda of position-dependent masking; None is uniform masking.
        token_shift: whether the state before a token predicts it.
        complementary: whether rows are trained with a mask and its complement.
        joint_weight: weight of the diffusion loss beside the autoregressive one; None: no such loss.
        mask_id: mask token.
        prompt_attention: how prompts are read.
        align_blocks: whether decoding blocks start at multiples of their length.
        threshold: recommended confidence threshold.
        learning_rate: peak, cosine decay, AdamW.
        tokens: training tokens.
    """

    init_from: str | None
    pattern: str = "block_diffusion"
    train_block: int | None = None
    eval_block: int | None = None
    half_life_ratio: float | None = None
    token_shift: bool = False
    complementary: bool = False
    joint_weight: float | None = None
    mask_id: int | None = None
    prompt_attention: str = "block_causal"
    align_blocks: bool = False
    threshold: float | None = 0.9
    learning_rate: float | None = None
    tokens: float | None = None


def _efficient(init_from: str, train_block: int, eval_block: int, tokens: float) -> Preset:
    return Preset(
        init_from,
        train_block=train_block,
        eval_block=eval_block,
        half_life_ratio=0.1,
        mask_id=151_662,
        prompt_attention="bidirectional",
        learning_rate=1e-5,
        tokens=tokens,
    )


PRESETS = {
    "efficient_dlm_1_5b": _efficient("Qwen/Qwen2.5-1.5B", 16, 16, 300e9),
    "efficient_dlm_4b": _efficient("Qwen/Qwen3-4B", 64, 32, 300e9),
    "efficient_dlm_8b": _efficient("Qwen/Qwen3-8B", 64, 32, 500e9),
    "fast_dllm_v2": Preset(
        "Qwen/Qwen2.5-7B-Instruct",
        train_block=32,
        eval_block=32,
        token_shift=True,
        complementary=True,
        mask_id=151_665,
        align_blocks=True,
        tokens=1e9,
    ),
    "sdar": Preset(None, align_blocks=True),
    "nemotron_labs_diffusion": Preset(None, joint_weight=0.3, mask_id=100, prompt_attention="causal"),
    "dream": Preset(
        "Qwen/Qwen2.5-7B", "bidirectional", token_shift=True, mask_id=151_666, prompt_attention="bidirectional"
    ),
    "llada": Preset(None, "bidirectional", mask_id=126_336, prompt_attention="bidirectional"),
}
"""LLaDA and Dream are trained to re-read the whole text in every pass; decoding them here, block after block over a
cache of finished tokens, is an approximation."""
