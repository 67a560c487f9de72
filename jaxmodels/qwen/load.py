"""Qwen checkpoints: config.json to `QwenConfig` and back, and the table from tensor names to parameters.

Everything that a configuration file may say is in one of three places here: read by `config_from_hf`,
required to have the one value that this implementation has (`FIXED`), or without effect on the forward pass
(`IGNORED`). A field that is in none of them is refused by name, because it may mean another model.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from jaxmodels.checkpoints.mapping import OtherLayout, Row
from jaxmodels.layers.rope import RopeConfig
from jaxmodels.qwen.config import LayerAttention, MobaConfig, MoeConfig, PromptAttention, QwenConfig

# ----------------------------------------------------------------------------------------------------
# Tensors. N query heads, K kv heads, H head dim, D model dim, F mlp dim, V vocabulary, W taps, E experts; the first
# "{}" is the layer, the second one the expert.
# Row(name in the checkpoint after its prefix, path in the parameters, dimensions in the checkpoint)

BODY = (
    Row("embed_tokens.weight", ("embed",), "V D"),
    Row("norm.weight", ("final_norm",), "D"),
    Row("layers.{}.input_layernorm.weight", ("layers", "attention_norm"), "D"),
    Row("layers.{}.self_attn.q_proj.weight", ("layers", "attention", "q"), "(N H) D"),
    Row("layers.{}.self_attn.k_proj.weight", ("layers", "attention", "k"), "(K H) D"),
    Row("layers.{}.self_attn.v_proj.weight", ("layers", "attention", "v"), "(K H) D"),
    Row("layers.{}.self_attn.o_proj.weight", ("layers", "attention", "o"), "D (N H)"),
    Row("layers.{}.post_attention_layernorm.weight", ("layers", "mlp_norm"), "D"),
)
MLP = (
    Row("layers.{}.mlp.gate_proj.weight", ("layers", "mlp", "gate"), "F D"),
    Row("layers.{}.mlp.up_proj.weight", ("layers", "mlp", "up"), "F D"),
    Row("layers.{}.mlp.down_proj.weight", ("layers", "mlp", "down"), "D F"),
)
ROUTER = Row("layers.{}.mlp.gate.weight", ("layers", "mlp", "router"), "E D")
EXPERTS = tuple(
    Row(f"layers.{{}}.mlp.experts.{{}}.{name}_proj.weight", ("layers", "mlp", name), dims, shared=shared)
    for name, dims, shared in (
        ("gate", "F D", "layers.{}.mlp.experts.gate_up_weight"),
        ("up", "F D", "layers.{}.mlp.experts.gate_up_weight"),
        ("down", "D F", "layers.{}.mlp.experts.down_weight"),
    )
)
QKV_BIAS = (
    Row("layers.{}.self_attn.q_proj.bias", ("layers", "attention", "q_bias"), "(N H)"),
    Row("layers.{}.self_attn.k_proj.bias", ("layers", "attention", "k_bias"), "(K H)"),
    Row("layers.{}.self_attn.v_proj.bias", ("layers", "attention", "v_bias"), "(K H)"),
)
QK_NORM = (
    Row("layers.{}.self_attn.q_norm.weight", ("layers", "attention", "q_norm"), "H"),
    Row("layers.{}.self_attn.k_norm.weight", ("layers", "attention", "k_norm"), "H"),
)
# PyTorch's depthwise Conv1d is [channels, 1, taps], and its last tap weighs the current token.
CONV1D = OtherLayout(lambda shape: (shape[1], 1, shape[0]), lambda weight: weight[:, 0, ::-1].T)
K_CONV = Row("layers.{}.self_attn.k_conv.weight", ("layers", "attention", "k_conv"), "W (K H)", other=CONV1D)
PREFIXES = (
    "model.",
    "encoder.",
    "",
)  # Qwen; the Efficient-DLM family; bare decoders such as embedding models
HEADS = ("lm_head.weight", "diffusion_head.weight")
IGNORED_TENSORS = (r".*rotary_emb\.inv_freq",)  # old releases stored what rope_theta determines


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names its tensors; `head` is None when it stores no head of its own."""

    prefix: str = "model."
    head: str | None = "lm_head.weight"

    @classmethod
    def find(cls, names: Collection[str]) -> "Layout":
        """The layout of a checkpoint; ValueError when its names fit none or several."""
        prefixes = [p for p in PREFIXES if p + "embed_tokens.weight" in names]
        heads = [h for h in HEADS if h in names]
        if len(prefixes) != 1:
            found = f"several: {prefixes}" if prefixes else "none of them"
            raise ValueError(
                f"expected one embedding among {[p + 'embed_tokens.weight' for p in PREFIXES]}; found {found}"
            )
        if len(heads) > 1:
            raise ValueError(f"two heads, {heads[0]!r} and {heads[1]!r}: which one to use is not known")
        return cls(prefixes[0], heads[0] if heads else None)

    @classmethod
    def standard(cls, family: str, config: QwenConfig) -> "Layout":
        """What `family` ("edlm" or any other) is written as."""
        prefix, head = ("encoder.", HEADS[1]) if family == "edlm" else ("model.", HEADS[0])
        return cls(prefix, None if config.tied_head else head)


def table(config: QwenConfig, layout: Layout) -> list[Row]:
    """All tensors of a checkpoint of `config`, complete both ways."""
    rows = [*BODY, *(QKV_BIAS if config.qkv_bias else ()), *(QK_NORM if config.qk_norm else ())]
    if config.moe is None:
        rows += MLP
    else:
        rows += [ROUTER, *(replace(row, experts=config.moe.num_experts) for row in EXPERTS)]
    if config.key_conv_taps is not None:
        convolved = tuple(n for n, layer in enumerate(config.layer_attention) if layer.key_conv is not None)
        rows.append(replace(K_CONV, layers=convolved))
    rows = [
        replace(row, key=layout.prefix + row.key, shared=None if row.shared is None else layout.prefix + row.shared)
        for row in rows
    ]
    if not config.tied_head:
        rows.append(Row(layout.head or HEADS[0], ("head",), "V D"))
    return rows


# ----------------------------------------------------------------------------------------------------
# config.json


@dataclass(frozen=True)
class Family:
    """What a `model_type` fixes. None for `qkv_bias` and `qk_norm`: the tensors of the checkpoint tell, or a field."""

    qkv_bias: bool | None
    qk_norm: bool | None
    diffusion: bool = False  # then a mask token is required
    block_size: str | None = None  # the field that holds the training block; None: not trained in blocks
    default_block_size: int | None = None  # of that field, when the family's own class has a default
    token_shift: bool = False
    prompt_attention: str = "block_causal"
    required: tuple[str, ...] = ()  # fields whose defaults differ from Qwen's
    hybrid: bool = False  # whether it has the fields of HYBRID
    moe: bool = False  # whether it has those of MOE, and a mixture of experts in every layer


FAMILIES = {
    "qwen2": Family(qkv_bias=True, qk_norm=False),  # Qwen2 and Qwen2.5
    "qwen3": Family(qkv_bias=False, qk_norm=True),
    "qwen3_moe": Family(
        qkv_bias=False,
        qk_norm=True,
        moe=True,
        required=("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    ),
    # ours: Qwen with layers that select blocks, convolve their keys or rotate nothing
    "qwen_moba": Family(None, None, required=("head_dim", "layer_types", "qkv_bias", "qk_norm"), hybrid=True),
    # Efficient-DLM; its released code reads prompts with full attention
    "edlm": Family(None, None, True, "block_size", 32, prompt_attention="bidirectional"),
    # Fast-dLLM v2: Qwen2.5 trained on blocks, still predicting the next token
    "Fast_dLLM_Qwen": Family(True, False, True, "bd_size", token_shift=True),
    "sdar": Family(False, True, True, "block_size"),
    # Dream: Qwen2.5 over the whole noisy sequence at once
    "Dream": Family(True, False, True, None, token_shift=True, prompt_attention="bidirectional"),
    # Nemotron-Labs-Diffusion: clean tokens are causal; neither biases nor norms of queries and keys
    "nemotron_labs_diffusion": Family(
        False,
        False,
        True,
        "block_size",
        32,
        prompt_attention="causal",
        required=("rms_norm_eps", "head_dim", "rope_parameters"),
    ),
}
REFUSED = {
    "qwen2_moe": "a mixture of experts with shared ones",
    "sdar_moe": "a mixture of experts",
    "qwen3_next": "a hybrid with linear attention",
    "llada": "another architecture (LLaDA: its own tensor names, no grouped queries)",
    "llada2_moe": "a mixture of experts",
}

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_positions",
}
READ = {
    *SIZES, "model_type", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "bos_token_id",
    "eos_token_id", "pad_token_id", "mask_token_id", "block_size", "bd_size", "token_shift", "prompt_attention",
    "dlm_type", "dlm_paradigm", "sparse_attention_config",
}  # fmt: skip
HYBRID = {
    "qkv_bias", "qk_norm", "moba_block_size", "moba_top_k", "key_conv_taps", "layer_key_conv", "layer_rotary",
}  # fmt: skip
NUM_EXPERTS = ("num_experts", "num_local_experts")  # the second one is what transformers 5 writes
MOE = {
    *NUM_EXPERTS, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers", "router_aux_loss_coef", "output_router_logits",
}  # fmt: skip
MOE_FIXED: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "use_sliding_window": (False, None),  # that class has a window in all layers, whatever max_window_layers says
}
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "residual_dropout": (0, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "num_nextn_predict_layers": (0, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "num_experts": (0, None),
    "dlm_arch": ("encoder", None),
    "num_ar_layers": (0, None),
    "num_diffusion_layers": (0, None),
    "use_relay": (False, None),
}
PARADIGMS = (  # names of training masks; which one was trained does not change how a checkpoint is read
    "autoregressive",
    "bidirectional",
    "prefix_bidirectional",
    "efficient_block_diff",
    "block_diff",
    "sbd_block_diff",
)
IGNORED = {
    # about files and libraries
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "tokenizer_class", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "attn_implementation", "use_cache", "initializer_range",
    "chunk_size_feed_forward", "gradient_checkpointing", "use_flash_attn", "fuse_cross_entropy", "model_name",
    # about outputs and tasks
    "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels",
    "problem_type", "task_specific_params", "finetuning_task", "is_decoder", "cross_attention_hidden_size",
    "prefix", "decoder_start_token_id", "sep_token_id", "unk_token_id", "cls_token_id",
    # defaults of generation that old releases keep here; generation_config.json is read instead
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    # about how a diffusion model was trained
    "tok_mask_half_life_ratio", "random_length_prob", "diff_loss_weight", "enforce_mask", "prefix_ratio",
    "adaptive_mask_rate", "multi_sampling", "num_skip_loss_tokens", "dlm_loss_weight", "ar_loss_weight",
    "global_loss_avg", "dp_varying_mask_ratio", "ada_perm_ratio_per_block", "ada_perm_ratio_global",
    "ada_dlm_loss_ratio", "enable_self_spec", "max_seq_length", "mask_eps",
}  # fmt: skip
IGNORED_PATTERN = re.compile(r"_.*|unsloth_.*")
ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor",
    "llama_4_scaling_beta",
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")


def _integer(config: Mapping[str, Any], field: str) -> int:
    if field not in config:
        raise ValueError(f"field {field!r} is missing")
    value = config[field]
    if type(value) is not int:
        raise ValueError(f"field {field!r} must be an integer; got {value!r}")
    return value


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if type(value) not in (int, float):
        raise ValueError(f"field {field!r} must be a number; got {value!r}")
    return float(value)


def _boolean(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"field {field!r} must be true or false; got {value!r}")
    return bool(value)


def check_fields(config: Mapping[str, Any], ignore: Collection[str] = ()) -> Family:
    """The family of a config.json whose every field is understood.

    `ignore` names further fields that the caller knows to be without effect. Raises ValueError naming the
    field and its value for an unknown model_type, unknown fields, and values not implemented.
    How weights are quantized is read elsewhere (jaxmodels.quantization).
    """
    model_type = config.get("model_type")
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} is {REFUSED[model_type]}, which is not implemented")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not implemented; known: {[*FAMILIES]}")
    has = FAMILIES[model_type]
    fixed = {f: values for f, values in FIXED.items() if not (has.moe and f in MOE)} | (MOE_FIXED if has.moe else {})
    for field, allowed in fixed.items():
        if field in config and config[field] not in allowed:
            raise ValueError(f"field {field!r} is {config[field]!r}; implemented: {allowed[0]!r}")
    # Qwen2's own class has biases whatever this says; in Qwen3's it would add one to the output projection
    # too
    if config.get("attention_bias") and (has.qkv_bias is False or has.hybrid):
        raise ValueError(f"field 'attention_bias' is true; implemented for {model_type!r}: false")
    for field in has.required:
        if config.get(field) is None:
            raise ValueError(f"field {field!r} is missing")
    if model_type == "nemotron_labs_diffusion" and config.get("sliding_window") is not None:
        # its attention has no use_sliding_window: a number alone is in force
        raise ValueError(f"field 'sliding_window' is {config['sliding_window']!r}; implemented: null")
    known = (
        READ
        | (HYBRID if has.hybrid else set())
        | (MOE if has.moe else set())
        | FIXED.keys()
        | IGNORED
        | {"attention_bias", "quantization_config", "compression_config"}
    )
    unknown = sorted(f for f in config if f not in known | set(ignore) and not IGNORED_PATTERN.fullmatch(f))
    if unknown:
        raise ValueError(
            f"unknown fields {', '.join(f'{f}={config[f]!r}' for f in unknown)}: they may change the model. "
            "Name them in ignore_config= if they do not"
        )
    return has


def rope_from_hf(config: Mapping[str, Any]) -> tuple[RopeConfig, int | None]:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Also a limit on positions, where a scaling that is not implemented is the identity up to there, else None.
    Raises ValueError naming unknown types and fields, and when both layouts are there and disagree.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for field in ("rope_parameters", "rope_scaling"):
        block = config.get(field)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise ValueError(f"field {field!r} must be an object; got {block!r}")
        nested = {k: v for k, v in block.items() if k in ("full_attention", "sliding_attention")}
        if nested:  # one block per kind of layer
            values = [v for v in nested.values() if v is not None]
            if len(nested) != len(block) or any(v != values[0] for v in values[1:]):
                raise ValueError(f"field {field!r} differs between kinds of layers, which is not implemented")
            block = values[0]
        unknown = sorted(set(block) - ROPE_FIELDS)
        kind = block.get("rope_type", block.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"field {field!r}: rope_type {kind!r} is not implemented; known: {[*ROPE_TYPES]}")
        if unknown:
            raise ValueError(f"field {field!r}: {unknown[0]!r} = {block[unknown[0]]!r} is not implemented")
        blocks[field] = {k: v for k, v in block.items() if v is not None and k != "type"} | {"rope_type": kind}
    if len(blocks) == 2:
        new, old = (dict(block) for block in blocks.values())
        theta = new.pop("rope_theta", None)
        if new != {k: v for k, v in old.items() if k != "rope_theta"} or theta != old.get("rope_theta", theta):
            raise ValueError("fields 'rope_parameters' and 'rope_scaling' disagree")
    rope = {**blocks.get("rope_scaling", {}), **blocks.get("rope_parameters", {})}
    outer = _number(config, "rope_theta", 10_000.0)
    theta = _number(rope, "rope_theta", outer)
    if "rope_theta" in config and theta != outer:
        raise ValueError(f"field 'rope_theta' is {outer}, but 'rope_parameters' has {theta}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not implemented")
    kind = rope.get("rope_type", "default")
    max_positions = _integer(config, "max_position_embeddings")
    fields: dict[str, Any] = {}
    original = _integer(rope, ORIGINAL) if ORIGINAL in rope else None
    if kind == "dynamic":  # transformers takes the trained length from max_position_embeddings
        if original not in (None, max_positions):
            raise ValueError(
                f"rope_type 'dynamic' extends max_position_embeddings ({max_positions}); "
                f"original_max_position_embeddings {original} is not implemented"
            )
        original = max_positions
    elif kind == "yarn":
        original = max_positions if original is None else original
        fields["factor"] = max_positions / original
    if original is not None:
        fields["original_max_positions"] = original
    for name in ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"):
        value = _number(rope, name, 0.0)
        if name in rope and not (value == 0 and name.startswith("beta")):  # transformers reads 0 as "not given"
            fields[name] = value
    if "truncate" in rope:
        fields["truncate"] = _boolean(rope, "truncate")
    limit = None
    if rope.get("llama_4_scaling_beta"):  # queries times 1 + beta log(1 + floor(position / original)): 1 below it
        limit = original
        if limit is None:
            raise ValueError("llama_4_scaling_beta needs original_max_position_embeddings")
    return RopeConfig(theta=theta, kind=kind, **fields), limit


def _each_layer(config: Mapping[str, Any], field: str, layers: int, default: bool) -> list[bool]:
    values = config.get(field)
    if values is None:
        return [default] * layers
    if not isinstance(values, list) or len(values) != layers or not all(isinstance(value, bool) for value in values):
        raise ValueError(f"field {field!r} must say true or false of {layers} layers; got {values!r}")
    return values


def attention_from_hf(config: Mapping[str, Any], layers: int, *, hybrid: bool) -> tuple[LayerAttention, ...]:
    """What each layer attends to: from `layer_types`, or from `max_window_layers` in older files.

    For a `hybrid` the fields of HYBRID count too. One that no layer makes use of is refused.
    """
    window = _integer(config, "sliding_window") if _boolean(config, "use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = _integer(
            {"max_window_layers": 28} | dict(config), "max_window_layers"
        )  # the classes of transformers have this default
        kinds = ["full_attention" if window is None or n < first else "sliding_attention" for n in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"field 'layer_types' must name {layers} layers; got {kinds!r}")
    known = ("full_attention", "sliding_attention", *(("moba_attention",) if hybrid else ()))
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"field 'layer_types' has {kind!r}; known: {', '.join(known)}")
    if window is None and "sliding_attention" in kinds:
        raise ValueError("field 'layer_types' has sliding_attention, but use_sliding_window is not true")
    described = [LayerAttention(window if kind == "sliding_attention" else None) for kind in kinds]
    if not hybrid:
        return tuple(described)
    convolved = _each_layer(config, "layer_key_conv", layers, False)
    rotated = _each_layer(config, "layer_rotary", layers, True)
    used = {
        "moba_block_size": ("'layer_types' has moba_attention", "moba_attention" in kinds),
        "moba_top_k": ("'layer_types' has moba_attention", "moba_attention" in kinds),
        "key_conv_taps": ("'layer_key_conv' is true", any(convolved)),
    }
    numbers: dict[str, int] = {}
    for field, (reason, needed) in used.items():
        if needed:
            numbers[field] = _integer(config, field)
        elif config.get(field) is not None:
            raise ValueError(f"field {field!r} is {config[field]!r}, but for no layer {reason}")
    moba = MobaConfig(numbers["moba_block_size"], numbers["moba_top_k"]) if "moba_attention" in kinds else None
    return tuple(
        replace(
            layer,
            moba=moba if kind == "moba_attention" else None,
            key_conv=numbers["key_conv_taps"] if with_conv else None,
            rotary=rotary,
        )
        for layer, kind, with_conv, rotary in zip(described, kinds, convolved, rotated, strict=True)
    )


def _moe_from_hf(config: Mapping[str, Any]) -> MoeConfig:
    counts = {field: _integer(config, field) for field in NUM_EXPERTS if config.get(field) is not None}
    if len(set(counts.values())) != 1:
        raise ValueError(f"one of the fields {', '.join(map(repr, NUM_EXPERTS))} must say how many; got {counts}")
    return MoeConfig(
        num_experts=next(iter(counts.values())),
        top_k=_integer(config, "num_experts_per_tok"),
        normalize=_boolean(config, "norm_topk_prob"),
    )


def _token_id(config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    if value is None or value == -1:  # -1 stands for "none" in some configuration classes
        return None
    if type(value) is not int:
        raise ValueError(f"field {field!r} must be an integer or null; got {value!r}")
    return value


def config_from_hf(
    config: Mapping[str, Any],
    names: Collection[str],
    *,
    mask_id: int | None = None,
    block_size: int | None = None,
    ignore: Collection[str] = (),
) -> QwenConfig:
    """The configuration that config.json and the names of the tensors describe.

    Args:
      config: content of config.json.
      names: tensor names of the checkpoint; they decide what the family leaves open (biases, norms, own
        head).
      mask_id: mask token where config.json has none; it is never guessed.
      block_size: training block where config.json has none.
      ignore: fields of config.json known to be without effect.

    Raises:
      ValueError: naming the field and its value for everything that is missing, malformed or not implemented.
    """
    family = check_fields(config, ignore)
    # A mixture of experts in every layer makes no use of the inner width of a dense MLP.
    fields = SIZES | ({"moe_intermediate_size": SIZES["intermediate_size"]} if family.moe else {})
    sizes = {name: _integer(config, field) for field, name in fields.items()}
    layout = Layout.find(names)
    if family.hybrid:
        family = replace(family, qkv_bias=_boolean(config, "qkv_bias"), qk_norm=_boolean(config, "qk_norm"))
    first = f"{layout.prefix}layers.0.self_attn."
    if family.qk_norm is None and first + "q_proj.weight" not in names:
        raise ValueError(
            f"model_type {config['model_type']!r} may have biases or norms of queries and keys, and "
            f"{first + 'q_proj.weight'!r}, whose neighbours would tell, is missing"
        )
    qkv_bias = first + "q_proj.bias" in names if family.qkv_bias is None else family.qkv_bias
    qk_norm = first + "q_norm.weight" in names if family.qk_norm is None else family.qk_norm
    if config.get("head_dim") is not None:
        head_dim = _integer(config, "head_dim")
    else:
        # Qwen3's class has this default; elsewhere, its mixtures of experts too, heads fill the width
        fixed = config["model_type"] in ("qwen3", "sdar") or (qk_norm and not family.moe)
        head_dim = 128 if fixed else sizes["dim"] // sizes["heads"]
    eos = config.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if any(type(i) is not int for i in eos_ids):
        raise ValueError(f"field 'eos_token_id' must be an integer, a list of them, or null; got {eos!r}")

    stored_mask = _token_id(config, "mask_token_id")
    if None not in (stored_mask, mask_id) and stored_mask != mask_id:
        raise ValueError(f"mask_id {mask_id} was given, but field 'mask_token_id' is {stored_mask}")
    mask_id = stored_mask if mask_id is None else mask_id
    if family.diffusion and mask_id is None:
        raise ValueError(
            f"model_type {config['model_type']!r} predicts masked tokens, but field 'mask_token_id' is missing; "
            "it is not guessed: pass mask_id="
        )
    field = family.block_size or "block_size"
    stored_block = config.get(field)
    if stored_block is not None and type(stored_block) is not int:
        raise ValueError(f"field {field!r} must be an integer or null; got {stored_block!r}")
    if None not in (stored_block, block_size) and stored_block != block_size:
        raise ValueError(f"block_size {block_size} was given, but field {field!r} is {stored_block}")
    for fallback in (stored_block, family.default_block_size):
        block_size = fallback if block_size is None else block_size
    if family.diffusion and family.block_size and block_size is None:
        raise ValueError(
            f"model_type {config['model_type']!r} was trained in blocks, but field {field!r} is missing; "
            "pass block_size="
        )
    if config.get("dlm_paradigm") not in (None, *PARADIGMS):
        raise ValueError(f"field 'dlm_paradigm' is {config['dlm_paradigm']!r}; known: {[*PARADIGMS]}")
    if config.get("dlm_type") not in (None, "llada", "dream"):
        raise ValueError(f"field 'dlm_type' is {config['dlm_type']!r}; known: 'llada', 'dream'")
    token_shift = family.token_shift or config.get("dlm_type") == "dream"
    if config.get("token_shift") is not None:
        token_shift = _boolean(config, "token_shift")

    prompt_attention = config.get("prompt_attention", family.prompt_attention)
    if prompt_attention not in get_args(PromptAttention):
        raise ValueError(f"field 'prompt_attention' is {prompt_attention!r}; known: {get_args(PromptAttention)}")

    rope, limit = rope_from_hf(config)
    if limit is not None and sizes["max_positions"] > limit:
        raise ValueError(
            f"field 'rope_parameters': llama_4_scaling_beta changes queries beyond position {limit}, which is not "
            f"implemented; lower max_position_embeddings ({sizes['max_positions']}) to {limit} to load the model"
        )
    return QwenConfig(
        **sizes,
        head_dim=head_dim,
        rope=rope,
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        moe=_moe_from_hf(config) if family.moe else None,
        tied_head=_boolean(config, "tie_word_embeddings"),
        layer_attention=attention_from_hf(config, sizes["layers"], hybrid=family.hybrid),
        eos_ids=eos_ids,
        bos_id=_token_id(config, "bos_token_id"),
        pad_id=_token_id(config, "pad_token_id"),
        mask_id=mask_id,
        block_size=block_size,
        token_shift=token_shift,
        prompt_attention=prompt_attention,
    )


def config_to_hf(config: QwenConfig, *, dtype: str, family: str | None = None) -> dict[str, Any]:
    """config.json for `config`; what `config_from_hf` reads back as an equal configuration.

    `family` is "qwen2", "qwen3" or "qwen3_moe" (read by transformers, as the autoregressive model), "qwen_moba" (any
    layers; nobody else reads it) or "edlm" (block-diffusion models; needs custom code elsewhere). None takes
    "qwen3_moe" for a mixture of experts, "qwen_moba" for layers that no other can express, "edlm" for a model with a
    block size, else the fitting Qwen.

    Raises ValueError when `family` cannot express the configuration.
    """
    plain = {(True, False): "qwen2", (False, True): "qwen3"}.get((config.qkv_bias, config.qk_norm))
    special = any(replace(layer, window=None) != LayerAttention() for layer in config.layer_attention)
    if config.moe is not None:
        everywhere = (LayerAttention(),) * config.layers
        needed = {"qkv_bias": False, "qk_norm": True, "block_size": None, "layer_attention": everywhere}
        other = [f"{name}={getattr(config, name)}" for name, value in needed.items() if getattr(config, name) != value]
        if other or family not in (None, "qwen3_moe"):
            raise ValueError(
                f"family {family or 'qwen3_moe'!r} cannot express {config.moe}{' with ' if other else ''}"
                f"{', '.join(other)}; possible: {'none' if other else repr('qwen3_moe')}"
            )
        plain = "qwen3_moe"
    if family is None:
        family = "qwen_moba" if special else plain if config.block_size is None else "edlm"
    if special and family != "qwen_moba":
        raise ValueError(
            f"family {family!r} cannot express layers with moba, a key convolution or no rotation; "
            "possible: 'qwen_moba'"
        )
    if family not in ("edlm", "qwen_moba", plain) or family is None:
        raise ValueError(
            f"family {family!r} cannot express qkv_bias={config.qkv_bias}, qk_norm={config.qk_norm}; "
            f"possible: {[f for f in (plain, 'qwen_moba', 'edlm') if f]}"
        )
    if family == "edlm" and None in (config.mask_id, config.block_size):
        raise ValueError(f"family 'edlm' needs mask_id and block_size; got {config.mask_id} and {config.block_size}")
    windows = {layer.window for layer in config.layer_attention if layer.window is not None}
    if len(windows) > 1:
        raise ValueError(f"layer_attention has windows of several sizes {sorted(windows)}; config.json holds one")
    window = windows.pop() if windows else None
    routed = {layer.moba for layer in config.layer_attention if layer.moba is not None}
    if len(routed) > 1:
        raise ValueError(f"layer_attention has moba of several kinds {sorted(map(str, routed))}; config.json holds one")
    rope = _rope_to_hf(config)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    result: dict[str, Any] = {
        "architectures": {
            "qwen2": ["Qwen2ForCausalLM"], "qwen3": ["Qwen3ForCausalLM"], "qwen3_moe": ["Qwen3MoeForCausalLM"],
            "edlm": ["EfficientDLM"], "qwen_moba": ["QwenMobaForCausalLM"],
        }[family],
        "model_type": family,
        **{field: getattr(config, name) for field, name in SIZES.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        # the layout before transformers 5, which other readers still expect
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else scaling,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": _first_window(config),
        "layer_types": [
            "full_attention" if a.full else "sliding_attention" if a.moba is None else "moba_attention"
            for a in config.layer_attention
        ],
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else [*config.eos_ids] or None,
        "pad_token_id": config.pad_id,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }  # fmt: skip
    if family in ("qwen3", "qwen3_moe"):
        result["attention_bias"] = False
    if config.moe is not None:
        result |= {
            "num_experts": config.moe.num_experts, "num_experts_per_tok": config.moe.top_k,
            "moe_intermediate_size": config.mlp_dim, "norm_topk_prob": config.moe.normalize,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    if family == "qwen_moba":
        result |= {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm}
        for moba in routed:
            result |= {"moba_block_size": moba.block_size, "moba_top_k": moba.top_k}
        if config.key_conv_taps is not None:
            result["key_conv_taps"] = config.key_conv_taps
        result["layer_key_conv"] = [layer.key_conv is not None for layer in config.layer_attention]
        result["layer_rotary"] = [layer.rotary for layer in config.layer_attention]
    if config.mask_id is not None:
        result["mask_token_id"] = config.mask_id
    if config.block_size is not None:
        result["block_size"] = config.block_size
    if config.block_size is not None or config.token_shift:
        result |= {"token_shift": config.token_shift, "prompt_attention": config.prompt_attention}
    elif config.prompt_attention != FAMILIES[family].prompt_attention:
        result["prompt_attention"] = config.prompt_attention
    if family == "edlm":
        result |= {"dlm_paradigm": "block_diff", "dlm_type": "dream" if config.token_shift else "llada"}
    return result


def _first_window(config: QwenConfig) -> int:
    """Layers before the first sliding one: what readers without `layer_types` go by."""
    return next((n for n, layer in enumerate(config.layer_attention) if layer.window is not None), config.layers)


def _rope_to_hf(config: QwenConfig) -> dict[str, Any]:
    rope = config.rope
    result: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "default":
        return result
    result["factor"] = rope.factor
    if rope.kind == "dynamic" and rope.original_max_positions != config.max_positions:
        raise ValueError(
            f"config.json cannot express dynamic RoPE with original_max_positions {rope.original_max_positions} "
            f"other than max_positions {config.max_positions}"
        )
    if rope.kind == "yarn":
        result["original_max_position_embeddings"] = rope.original_max_positions
        optional = {
            "attention_factor": rope.attention_factor,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
        }
        result |= {name: value for name, value in optional.items() if value is not None}
        result |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    return result
