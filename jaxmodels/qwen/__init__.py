"""Qwen2, Qwen2.5 and Qwen3: one decoder, differences as configuration."""

from jaxmodels.qwen.config import LayerAttention, MobaConfig, QwenConfig, sliding_windows
from jaxmodels.qwen.model import CausalLM, Hidden, build

__all__ = ["CausalLM", "Hidden", "LayerAttention", "MobaConfig", "QwenConfig", "build", "sliding_windows"]
