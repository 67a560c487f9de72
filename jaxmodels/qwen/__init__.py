"""Qwen2, Qwen2.5 and Qwen3: one decoder, differences as configuration."""

from jaxmodels.qwen.config import LayerAttention, MobaConfig, QwenConfig, hybrid_layers, sliding_windows
from jaxmodels.qwen.convert import route_layers
from jaxmodels.qwen.model import CausalLM, Hidden, build

__all__ = [
    "CausalLM",
    "Hidden",
    "LayerAttention",
    "MobaConfig",
    "QwenConfig",
    "build",
    "hybrid_layers",
    "route_layers",
    "sliding_windows",
]
