"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE: one decoder, differences as configuration."""

from jaxmodels.qwen.config import LayerAttention, MobaConfig, MoeConfig, QwenConfig, hybrid_layers, sliding_windows
from jaxmodels.qwen.convert import route_layers
from jaxmodels.qwen.model import CausalLM, Hidden, build

__all__ = [
    "CausalLM",
    "Hidden",
    "LayerAttention",
    "MobaConfig",
    "MoeConfig",
    "QwenConfig",
    "build",
    "hybrid_layers",
    "route_layers",
    "sliding_windows",
]
