"""Configuration of the Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE decoders and of block-diffusion models made from them."""

import dataclasses
from typing import Any, Literal, get_args

from jaxmodels.layers.rope import RopeConfig

QWEN_ROPE = RopeConfig(theta=1_000_000.0)
PromptAttention = Literal["bidirectional", "block_causal", "causal"]


@dataclasses.dataclass(frozen=True)
class MobaConfig:
    """Block-routed attention: see `pallas_kernels.moba.moba_attention`.

    Attributes:
      block_size: keys of a block.
      top_k: blocks that each query selects, its own among them.
    """

    block_size: int = 128
    top_k: int = 8

    def __post_init__(self):
        for name in ("block_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of moba must be at least 1; got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of every layer's MLP.

    Attributes:
      num_experts: SwiGLU blocks of a layer (E), each of inner width `mlp_dim`.
      top_k: experts that the router picks for each token.
      normalize: whether the weights of a token's experts sum to 1.
    """

    num_experts: int
    top_k: int
    normalize: bool = True

    def __post_init__(self):
        if self.num_experts < 1:
            raise ValueError(f"num_experts of moe must be at least 1; got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k of moe must lie in [1, num_experts={self.num_experts}]; got {self.top_k}")


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """What one layer attends to, and what becomes of its keys; without arguments full attention with rotation.

    Attributes:
      window: queries see the latest `window` tokens only; None: no limit.
      moba: queries see the blocks that they select only; None: no blocks. Not together with a window.
      key_conv: taps of the short causal convolution over the keys, before rotation; None: there is none.
      rotary: queries and keys are rotated by their positions.
    """

    window: int | None = None
    moba: MobaConfig | None = None
    key_conv: int | None = None
    rotary: bool = True

    def __post_init__(self):
        for name in ("window", "key_conv"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"the {name} of a layer must be None or at least 1; got {value}")
        if self.window is not None and self.moba is not None:
            raise ValueError(f"a layer has a window or moba; got window={self.window} and {self.moba}")

    @property
    def full(self) -> bool:
        """Whether queries see everything up to themselves."""
        return self.window is None and self.moba is None


def sliding_windows(*windows: int | None) -> tuple[LayerAttention, ...]:
    """The `layer_attention` of layers that differ in their windows only, None being full attention."""
    return tuple(LayerAttention(window) for window in windows)


def hybrid_layers(
    layers: int, *, window: int = 256, moba: MobaConfig | None = MobaConfig(), key_conv: int | None = 3
) -> tuple[LayerAttention, ...]:
    """The hybrids of FlashMoBA (arXiv 2511.11571): a sliding window and blocks in turn.

    The 1st, 3rd, ... layer has the window and rotation; the others select blocks (None: see everything), without
    rotation, and convolve their keys (None: do not).
    """
    pair = (LayerAttention(window=window), LayerAttention(moba=moba, key_conv=key_conv, rotary=False))
    return tuple(pair[layer % 2] for layer in range(layers))


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """One decoder family; the differences between its members are fields.

    Qwen2 and Qwen2.5 have `qkv_bias`, Qwen3 has `qk_norm` and a head_dim of its own.

    Attributes:
      vocab_size: rows of the embedding and outputs of the head (V).
      dim: width of the residual stream (D).
      layers: number of decoder blocks (L).
      heads, kv_heads, head_dim: query heads (N), key/value heads (K), size of each (H).
      mlp_dim: inner width of the SwiGLU block, or of each expert's (F).
      rope: rotary position embedding.
      norm_eps: epsilon of every RMSNorm.
      qkv_bias: biases on the query, key and value projections.
      qk_norm: RMSNorm over each query and key head before the rotation.
      moe: a mixture of experts in every layer; None: one SwiGLU block.
      tied_head: the head is the embedding matrix.
      layer_attention: what each layer attends to; () means everything up to itself, everywhere.
      max_positions: longest sequence the weights were made for.
      eos_ids: tokens that end a text.
      bos_id, pad_id, mask_id: special tokens, None where the model has none.
      block_size: training block of a block-diffusion model; None for an autoregressive one.
      token_shift: whether logits at position i are about token i + 1 in a block-diffusion model.
      prompt_attention: how a block-diffusion model reads its prompt.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: RopeConfig = QWEN_ROPE
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: MoeConfig | None = None
    tied_head: bool = False
    layer_attention: tuple[LayerAttention, ...] = ()
    max_positions: int = 32_768
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    mask_id: int | None = None
    block_size: int | None = None
    token_shift: bool = False
    prompt_attention: PromptAttention = "block_causal"

    def __post_init__(self):
        for name in (
            "vocab_size",
            "dim",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "mlp_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings; got {self.head_dim}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive; got {self.norm_eps}")
        if not self.layer_attention:
            object.__setattr__(self, "layer_attention", (LayerAttention(),) * self.layers)
        if len(self.layer_attention) != self.layers:
            raise ValueError(f"layer_attention must name {self.layers} layers; got {len(self.layer_attention)}")
        for what, values in (
            ("taps of key convolutions", {a.key_conv for a in self.layer_attention if a.key_conv is not None}),
            ("block sizes of moba", {a.moba.block_size for a in self.layer_attention if a.moba is not None}),
        ):
            if len(values) > 1:
                raise ValueError(f"layer_attention has different {what}, {sorted(values)}; all layers must share one")
        for name in ("bos_id", "pad_id", "mask_id"):
            self._check_token(name, getattr(self, name))
        for token in self.eos_ids:
            self._check_token("eos_ids", token)
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be None or at least 1; got {self.block_size}")
        if self.prompt_attention not in get_args(PromptAttention):
            raise ValueError(
                f"prompt_attention must be one of {get_args(PromptAttention)}; got {self.prompt_attention!r}"
            )

    def _check_token(self, name: str, token: int | None) -> None:
        if token is not None and not 0 <= token < self.vocab_size:
            raise ValueError(f"{name} must lie in [0, vocab_size={self.vocab_size}); got {token}")

    @property
    def key_conv_taps(self) -> int | None:
        """Taps of the layers with a key convolution; None: no layer has one."""
        return next((a.key_conv for a in self.layer_attention if a.key_conv is not None), None)

    @property
    def moba_block_size(self) -> int | None:
        """Keys of a block in the layers that select blocks; None: no layer does."""
        return next((a.moba.block_size for a in self.layer_attention if a.moba is not None), None)

    @classmethod
    def qwen2_5_0_5b(cls) -> "QwenConfig":
        """Source: huggingface.co/Qwen/Qwen2.5-0.5B, config.json."""
        return cls(
            vocab_size=151_936, dim=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp_dim=4_864,
            qkv_bias=True, tied_head=True, eos_ids=(151_643,), bos_id=151_643,
        )  # fmt: skip

    @classmethod
    def qwen2_5_1_5b(cls) -> "QwenConfig":
        """Source: huggingface.co/Qwen/Qwen2.5-1.5B, config.json."""
        return cls(
            vocab_size=151_936, dim=1_536, layers=28, heads=12, kv_heads=2, head_dim=128, mlp_dim=8_960,
            qkv_bias=True, tied_head=True, max_positions=131_072, eos_ids=(151_643,), bos_id=151_643,
        )  # fmt: skip

    @classmethod
    def qwen3_0_6b(cls) -> "QwenConfig":
        """Source: huggingface.co/Qwen/Qwen3-0.6B, config.json."""
        return cls(
            vocab_size=151_936, dim=1_024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp_dim=3_072,
            qk_norm=True, tied_head=True, max_positions=40_960, eos_ids=(151_645,), bos_id=151_643,
        )  # fmt: skip

    @classmethod
    def qwen3_4b(cls) -> "QwenConfig":
        """Source: huggingface.co/Qwen/Qwen3-4B, config.json."""
        return cls(
            vocab_size=151_936, dim=2_560, layers=36, heads=32, kv_heads=8, head_dim=128, mlp_dim=9_728,
            qk_norm=True, tied_head=True, max_positions=40_960, eos_ids=(151_645,), bos_id=151_643,
        )  # fmt: skip

    @classmethod
    def qwen3_8b(cls) -> "QwenConfig":
        """Source: huggingface.co/Qwen/Qwen3-8B, config.json."""
        return cls(
            vocab_size=151_936, dim=4_096, layers=36, heads=32, kv_heads=8, head_dim=128, mlp_dim=12_288,
            qk_norm=True, max_positions=40_960, eos_ids=(151_645,), bos_id=151_643,
        )  # fmt: skip

    @classmethod
    def qwen3_30b_a3b(cls) -> "QwenConfig":
        """Source: huggingface.co/Qwen/Qwen3-30B-A3B, config.json."""
        return cls(
            vocab_size=151_936, dim=2_048, layers=48, heads=32, kv_heads=4, head_dim=128, mlp_dim=768,
            qk_norm=True, moe=MoeConfig(num_experts=128, top_k=8), max_positions=40_960, eos_ids=(151_645,),
            bos_id=151_643,
        )  # fmt: skip

    @classmethod
    def moba_340m(cls, moba: MobaConfig | None = MobaConfig(), key_conv: int | None = 3) -> "QwenConfig":
        """The smaller hybrid of FlashMoBA, 341 million parameters; `moba` and `key_conv` as in `hybrid_layers`.

        Source: arXiv 2511.11571, which names the sizes; no weights are published. Theirs to say and ours to choose:
        the head is tied (their count fits that), the rotation has base 10,000, there are neither biases nor norms.
        """
        return cls(
            vocab_size=32_000, dim=1_024, layers=24, heads=16, kv_heads=16, head_dim=64, mlp_dim=2_816, tied_head=True,
            rope=RopeConfig(theta=10_000.0), layer_attention=hybrid_layers(24, moba=moba, key_conv=key_conv),
            max_positions=8_192,
        )  # fmt: skip

    @classmethod
    def moba_1b(cls, moba: MobaConfig | None = MobaConfig(), key_conv: int | None = 3) -> "QwenConfig":
        """The larger hybrid of FlashMoBA, see `moba_340m`; 1.7 billion parameters, which the paper calls 1B."""
        return cls(
            vocab_size=32_000, dim=2_048, layers=24, heads=32, kv_heads=32, head_dim=64, mlp_dim=8_192, tied_head=True,
            rope=RopeConfig(theta=10_000.0), layer_attention=hybrid_layers(24, moba=moba, key_conv=key_conv),
            max_positions=8_192,
        )  # fmt: skip

    @classmethod
    def moba_tiny(cls) -> "QwenConfig":
        """The same structure for a CPU, 0.9 million parameters: sizes are ours, to show how training and files work."""
        moba = MobaConfig(block_size=16, top_k=4)
        return cls(
            vocab_size=512, dim=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp_dim=352, tied_head=True,
            rope=RopeConfig(theta=10_000.0), layer_attention=hybrid_layers(4, window=32, moba=moba),
            max_positions=1_024,
        )  # fmt: skip

    @classmethod
    def tiny(cls, **changes: Any) -> "QwenConfig":
        """A model for tests: Qwen3's structure, three layers, head_dim apart from dim / heads."""
        fields: dict[str, Any] = {
            "vocab_size": 97, "dim": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32,
            "mlp_dim": 128, "rope": RopeConfig(theta=10_000.0), "qk_norm": True, "max_positions": 256,
            "eos_ids": (1,), "pad_id": 0, "mask_id": 2,
        }  # fmt: skip
        return cls(**(fields | changes))
