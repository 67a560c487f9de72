"""config.json to QwenConfig: both RoPE layouts, windows, diffusion families, and everything that is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.layers.rope import RopeConfig, rope_tables
from jaxmodels.qwen.config import MoeConfig, QwenConfig, sliding_windows
from jaxmodels.qwen.load import FAMILIES, Layout, config_from_hf, config_to_hf, rope_from_hf, table

QWEN2_NAMES = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"}
QWEN3_NAMES = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_norm.weight"}
EDLM_NAMES = {"encoder.embed_tokens.weight", "diffusion_head.weight"}
EDLM_NAMES |= {"encoder.layers.0.self_attn.q_norm.weight", "encoder.layers.0.self_attn.q_proj.weight"}
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip

# As published: Qwen/Qwen2.5-0.5B (before transformers 5)
QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
# Qwen/Qwen3-8B
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

# Qwen/Qwen3-30B-A3B
QWEN3_30B_A3B = {
    **QWEN3_8B, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
    "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip


def read(names=QWEN3_NAMES, ignore=(), mask_id=None, given_block=None, **fields) -> QwenConfig:
    config = {"model_type": "qwen3", **SIZES, "head_dim": 32, **fields}
    config = {k: v for k, v in config.items() if v is not ...}
    return config_from_hf(config, names, ignore=ignore, mask_id=mask_id, block_size=given_block)


def test_published_configurations_equal_the_presets():
    assert config_from_hf(QWEN2_5_0_5B, QWEN2_NAMES - {"lm_head.weight"}) == QwenConfig.qwen2_5_0_5b()
    assert config_from_hf(QWEN3_8B, QWEN3_NAMES) == QwenConfig.qwen3_8b()
    assert config_from_hf(QWEN3_30B_A3B, QWEN3_NAMES) == QwenConfig.qwen3_30b_a3b()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2; implemented: 1"),
        ({"mlp_only_layers": [0]}, r"'mlp_only_layers' is \[0\]; implemented: \[\]"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True; implemented: False"),
        ({"num_experts": ...}, r"one of the fields 'num_experts', 'num_local_experts' must say how many; got \{\}"),
        ({"num_local_experts": 6}, "'num_experts': 128, 'num_local_experts': 6"),
        ({"num_experts_per_tok": ...}, "'num_experts_per_tok' is missing"),
        ({"norm_topk_prob": 1}, "'norm_topk_prob' must be true or false; got 1"),
        ({"num_experts_per_tok": 129}, r"top_k of moe must lie in \[1, num_experts=128\]; got 129"),
        ({"n_shared_experts": 1}, "unknown fields n_shared_experts=1"),
    ],
)
def test_mixtures_of_experts_that_are_not_implemented(fields, message):
    config = {k: v for k, v in (QWEN3_30B_A3B | fields).items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        config_from_hf(config, QWEN3_NAMES)


def test_other_spellings_of_a_mixture_of_experts():
    config = QWEN3_30B_A3B | {"num_local_experts": 128}
    assert config_from_hf(config, QWEN3_NAMES) == QwenConfig.qwen3_30b_a3b()
    del config["num_experts"], config["head_dim"]  # that class has no head_dim of its own
    assert config_from_hf(config, QWEN3_NAMES).head_dim == 2048 // 32


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"block_size": 16}, None), ({"block_size": 16}, "edlm"), ({}, "qwen3"), ({"qk_norm": False}, None),
        ({"layer_attention": sliding_windows(4, 4, None)}, "qwen3_moe"),
    ],
)  # fmt: skip
def test_mixtures_of_experts_that_no_file_can_express(changes, family):
    config = QwenConfig.tiny(moe=MoeConfig(4, 2), **changes)
    with pytest.raises(
        ValueError, match=rf"family '{family or 'qwen3_moe'}' cannot express MoeConfig\(num_experts=4, top_k=2"
    ):
        config_to_hf(config, dtype="float32", family=family)


def test_the_mapped_fields_arrive():
    config = read(rms_norm_eps=1e-5, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6, mask_token_id=7)
    expected = QwenConfig(
        vocab_size=160, dim=64, layers=4, heads=4, kv_heads=2, head_dim=32, mlp_dim=96, max_positions=512,
        rope=RopeConfig(theta=10_000.0), norm_eps=1e-5, qk_norm=True, bos_id=3, eos_ids=(4, 5), pad_id=6, mask_id=7,
    )  # fmt: skip
    assert config == expected
    assert read(eos_token_id=4).eos_ids == (4,) and read(eos_token_id=None).eos_ids == ()


def test_head_dim_defaults_are_those_of_the_classes():
    assert read(head_dim=...).head_dim == 128  # Qwen3Config
    assert read(QWEN2_NAMES, model_type="qwen2", head_dim=...).head_dim == 16
    assert read(QWEN2_NAMES, model_type="qwen2", head_dim=None).head_dim == 16


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, RopeConfig(theta=10_000.0)),
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeConfig(kind="linear", factor=4.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            RopeConfig(theta=5e5, kind="linear", factor=4.0),
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            RopeConfig(kind="dynamic", factor=2.0, original_max_positions=512),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            RopeConfig(kind="yarn", factor=4.0, original_max_positions=128),
        ),
        (  # transformers takes max_position_embeddings for the missing length, and the ratio for the missing factor
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 0}},
            RopeConfig(kind="yarn", factor=4.0, original_max_positions=512),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
            RopeConfig(kind="yarn", factor=8.0, original_max_positions=64),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16,
                    "beta_slow": 2, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False, "attention_factor": 1.1
                }
            },
            RopeConfig(
                kind="yarn", factor=4.0, original_max_positions=128, beta_fast=16.0, beta_slow=2.0, mscale=1.2,
                mscale_all_dim=0.7, truncate=False, attention_factor=1.1,
            ),
        ),
        (
            {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 5e5} for k in ("full_attention",)}},
            RopeConfig(theta=5e5),
        ),
        (  # both layouts, as save_pretrained writes them
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_theta": 5e5,
            },
            RopeConfig(theta=5e5, kind="linear", factor=2.0),
        ),
    ],
)  # fmt: skip
def test_rope_layouts(rope, expected):
    assert read(**rope).rope == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' is not implemented"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type 'mrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta": 1}}, "'beta' = 1 is not implemented"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "does not use factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "'factor' must be a number; got '4'"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8.0}}, "must be an integer; got 8.0"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "'rope_parameters' and 'rope_scaling' disagree",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "'rope_theta' is 10000.0, but"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e5}}},
            "differs between kinds of layers",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 99}},
            "original_max_position_embeddings 99",
        ),
    ],
)
def test_rope_that_is_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        read(**rope)


def test_windows_from_layer_types_and_from_older_fields():
    def windows(**fields):
        layers = read(**fields).layer_attention
        assert layers == sliding_windows(*(layer.window for layer in layers))
        return tuple(layer.window for layer in layers)

    assert windows(use_sliding_window=False, sliding_window=8, max_window_layers=2) == (None,) * 4
    assert windows(use_sliding_window=True, sliding_window=8, max_window_layers=3) == (None, None, None, 8)
    assert windows(use_sliding_window=True, sliding_window=8) == (None,) * 4  # 28 layers come first
    kinds = ["sliding_attention", "full_attention"] * 2
    fields = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": kinds}
    assert windows(**fields) == (8, None, 8, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"]}, "'layer_types' must name 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "'layer_types' has 'linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is not true"),
        ({"use_sliding_window": True, "sliding_window": None}, "'sliding_window' must be an integer"),
        ({"use_sliding_window": True}, "'sliding_window' is missing"),
        ({"use_sliding_window": "yes"}, "'use_sliding_window' must be true or false"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is a mixture of experts with shared ones"),
        ({"model_type": "sdar_moe"}, "model_type 'sdar_moe' is a mixture of experts"),
        ({"moe_intermediate_size": 8}, "unknown fields moe_intermediate_size=8"),
        ({"model_type": "llada"}, "model_type 'llada' is another architecture"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not implemented; known: .*qwen2.*qwen3.*edlm"),
        ({"model_type": ...}, "model_type None"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; implemented: 'silu'"),
        ({"attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
        ({"attention_bias": True}, "'attention_bias' is true"),
        ({"mlp_bias": True}, "'mlp_bias' is True"),
        ({"num_experts": 8}, "'num_experts' is 8"),
        ({"novel_gate": 3}, "unknown fields novel_gate=3"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' must be an integer; got '64'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be an integer; got True"),
        ({"num_attention_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' must be a number"),
        ({"head_dim": 8.0}, "'head_dim' must be an integer; got 8.0"),
        ({"rope_theta": "1e6"}, "'rope_theta' must be a number"),
        ({"eos_token_id": "2"}, "'eos_token_id' must be"),
        ({"eos_token_id": 160}, "eos_ids must lie in"),
        ({"pad_token_id": 1.0}, "'pad_token_id' must be an integer"),
        ({"mask_token_id": 400}, "mask_id must lie in"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false"),
        ({"dlm_paradigm": "other"}, "'dlm_paradigm' is 'other'"),
        ({"dlm_type": "other"}, "'dlm_type' is 'other'"),
        ({"dlm_arch": "encoder_decoder"}, "'dlm_arch' is 'encoder_decoder'"),
        ({"num_ar_layers": 2}, "'num_ar_layers' is 2"),
        ({"prompt_attention": "sideways"}, "'prompt_attention' is 'sideways'"),
    ],
)
def test_values_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        read(**fields)


def test_fields_without_effect_pass_and_others_can_be_named():
    read(_name_or_path="x", unsloth_version="2026.1", output_attentions=False, temperature=0.7)
    assert read(novel_gate=3, ignore=("novel_gate",)) == read()


DIFFUSION = {
    "edlm": (EDLM_NAMES, {"block_size": 16, "dlm_paradigm": "block_diff", "tok_mask_half_life_ratio": 0.1}),
    "Fast_dLLM_Qwen": (QWEN2_NAMES, {"bd_size": 32}),
    "sdar": (QWEN3_NAMES, {"block_size": 4}),
    "Dream": (QWEN2_NAMES, {}),
    "nemotron_labs_diffusion": (
        {"encoder.embed_tokens.weight", "diffusion_head.weight"},
        {
            "block_size": 32,
            "dlm_paradigm": "bidirectional",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("edlm", (16, False, "bidirectional", False, True)),
        ("Fast_dLLM_Qwen", (32, True, "block_causal", True, False)),
        ("sdar", (4, False, "block_causal", False, True)),
        ("Dream", (None, True, "bidirectional", True, False)),
        ("nemotron_labs_diffusion", (32, False, "causal", False, False)),
    ],
)
def test_diffusion_families(model_type, expected):
    names, fields = DIFFUSION[model_type]
    config = read(names, model_type=model_type, mask_token_id=7, **fields)
    found = (config.block_size, config.token_shift, config.prompt_attention, config.qkv_bias, config.qk_norm)
    assert found == expected and config.mask_id == 7


@pytest.mark.parametrize("model_type", DIFFUSION)
@pytest.mark.parametrize("stored", [..., None, -1])
def test_the_mask_token_is_never_guessed(model_type, stored):
    names, fields = DIFFUSION[model_type]
    with pytest.raises(ValueError, match=r"'mask_token_id' is missing; it is not guessed: pass mask_id="):
        read(names, model_type=model_type, mask_token_id=stored, **fields)
    assert read(names, model_type=model_type, mask_token_id=stored, mask_id=9, **fields).mask_id == 9


def test_given_values_must_not_contradict_the_file():
    with pytest.raises(ValueError, match="mask_id 9 was given, but field 'mask_token_id' is 7"):
        read(mask_token_id=7, mask_id=9)
    with pytest.raises(ValueError, match="block_size 8 was given, but field 'bd_size' is 32"):
        read(QWEN2_NAMES, model_type="Fast_dLLM_Qwen", bd_size=32, mask_token_id=7, given_block=8)
    with pytest.raises(ValueError, match="'block_size' is missing; pass block_size="):
        read(QWEN3_NAMES, model_type="sdar", mask_token_id=7)
    assert read(QWEN3_NAMES, model_type="sdar", mask_token_id=7, given_block=8).block_size == 8
    assert read(EDLM_NAMES, model_type="edlm", mask_token_id=7, given_block=8).block_size == 8  # over a default


def test_edlm_takes_its_structure_from_the_tensors():
    config = read(
        QWEN2_NAMES | {"model.layers.0.self_attn.q_proj.weight"}, model_type="edlm", mask_token_id=7, head_dim=...
    )
    assert (config.qkv_bias, config.qk_norm, config.head_dim, config.block_size) == (True, False, 16, 32)
    assert read(EDLM_NAMES, model_type="edlm", mask_token_id=7, dlm_type="dream").token_shift
    with pytest.raises(ValueError, match=r"'encoder\.layers\.0\.self_attn\.q_proj\.weight', .* is missing"):
        read({"encoder.embed_tokens.weight"}, model_type="edlm", mask_token_id=7)


def test_query_scaling_by_position_is_refused_where_it_would_matter():
    names, fields = DIFFUSION["nemotron_labs_diffusion"]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1}
    fields = fields | {"model_type": "nemotron_labs_diffusion", "mask_token_id": 7, "rope_parameters": rope}
    with pytest.raises(ValueError, match=r"llama_4_scaling_beta .* beyond position 128.* lower .*512.* to 128"):
        read(names, **fields)
    assert read(names, **fields, max_position_embeddings=128).rope.factor == 4.0


def test_a_nemotron_labs_configuration_as_published():
    """The 3B model: YaRN with a factor below 1, queries scaled only beyond its own maximum of positions."""
    published = {
        "architectures": ["NemotronLabsDiffusionModel"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_implementation": "sdpa", "block_size": 32, "bos_token_id": 1, "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional", "dp_varying_mask_ratio": False, "eos_token_id": 2, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 9216, "mask_token_id": 100,
        "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "nemotron_labs_diffusion",
        "num_attention_heads": 32, "num_hidden_layers": 26, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 0.25, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
            "rope_type": "yarn",
        },
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131072,
    }  # fmt: skip
    config = config_from_hf(published, {"encoder.embed_tokens.weight", "diffusion_head.weight"})
    assert (config.mask_id, config.block_size, config.rope.factor, config.layers) == (100, 32, 0.25, 26)
    names = {"encoder.embed_tokens.weight", "diffusion_head.weight"}
    for field in ("rms_norm_eps", "head_dim", "rope_parameters"):
        with pytest.raises(ValueError, match=f"'{field}' is missing"):
            config_from_hf({k: v for k, v in published.items() if k != field}, names)
    with pytest.raises(ValueError, match="'sliding_window' is 64; implemented: null"):
        config_from_hf(published | {"sliding_window": 64}, names)


def test_yarn_below_one_rotates_as_in_transformers():
    """Frequency 40 of 64 and the attention factor, from ROPE_INIT_FUNCTIONS["yarn"] of transformers 5.23."""
    rope = RopeConfig(kind="yarn", theta=1e6, factor=0.25, original_max_positions=16384, mscale=1.2, mscale_all_dim=0.7)
    cos, sin = rope_tables(rope, 128, jnp.full((1, 1), 1000))
    np.testing.assert_allclose([cos[0, 0, 40], sin[0, 0, 40]], [np.cos(0.71131176), np.sin(0.71131176)], atol=1e-5)


def test_layouts():
    assert Layout.find(QWEN3_NAMES) == Layout("model.", "lm_head.weight")
    assert Layout.find(EDLM_NAMES) == Layout("encoder.", "diffusion_head.weight")
    assert Layout.find({"embed_tokens.weight"}) == Layout("", None)
    with pytest.raises(ValueError, match="none of them"):
        Layout.find({"transformer.wte.weight"})
    with pytest.raises(ValueError, match="several"):
        Layout.find(QWEN3_NAMES | EDLM_NAMES)
    with pytest.raises(ValueError, match="two heads"):
        Layout.find(QWEN3_NAMES | {"diffusion_head.weight"})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True, "eos_ids": (1, 5), "bos_id": 4},
        {"qk_norm": False, "qkv_bias": True, "mask_id": None, "eos_ids": ()},
        {"layer_attention": sliding_windows(None, 8, None), "rope": RopeConfig(theta=5e5, kind="linear", factor=2.0)},
        {"rope": RopeConfig(kind="dynamic", factor=2.0, original_max_positions=256)},
        {"rope": RopeConfig(kind="yarn", factor=2.0, original_max_positions=64, mscale=0.5, truncate=False)},
        {"block_size": 16},
        {"block_size": 16, "token_shift": True, "prompt_attention": "causal"},
        {"block_size": 16, "qkv_bias": True, "prompt_attention": "bidirectional"},
    ],
)
@pytest.mark.parametrize("family", [None, "qwen", "edlm"])
def test_written_configurations_are_read_back(changes, family):
    config = QwenConfig.tiny(**changes)
    plain = "qwen2" if config.qkv_bias else "qwen3"
    family = plain if family == "qwen" else family
    expressible = not (config.qkv_bias and config.qk_norm) or (family or "edlm") == "edlm"
    if not expressible or (family == "edlm" and None in (config.mask_id, config.block_size)):
        with pytest.raises(ValueError, match=r"cannot express|needs mask_id and block_size"):
            config_to_hf(config, dtype="float32", family=family)
        return
    written = config_to_hf(config, dtype="float32", family=family)
    names = {row.name(0) for row in table(config, Layout.standard(written["model_type"], config))}
    assert config_from_hf(written, names) == config


def test_configurations_without_an_expression_are_refused():
    with pytest.raises(ValueError, match=r"windows of several sizes \[4, 8\]"):
        config_to_hf(QwenConfig.tiny(layer_attention=sliding_windows(4, 8, None)), dtype="float32")
    with pytest.raises(ValueError, match="dynamic RoPE with original_max_positions 64"):
        config_to_hf(
            QwenConfig.tiny(rope=RopeConfig(kind="dynamic", factor=2.0, original_max_positions=64)), dtype="float32"
        )
    with pytest.raises(ValueError, match="cannot express qkv_bias=False, qk_norm=False"):
        config_to_hf(QwenConfig.tiny(qk_norm=False), dtype="float32")


def test_every_field_of_the_configuration_is_written_and_read():
    """A field of QwenConfig that the files do not carry would be lost by saving; each must change the file."""
    base = QwenConfig.tiny(block_size=16)
    changes = {
        "vocab_size": 98, "dim": 32, "layers": 2, "heads": 2, "kv_heads": 4, "head_dim": 16, "mlp_dim": 64,
        "rope": RopeConfig(theta=9.0), "norm_eps": 1e-5, "qkv_bias": True, "qk_norm": False, "tied_head": True,
        "moe": MoeConfig(4, 2, False), "layer_attention": sliding_windows(4, 4, None), "max_positions": 99,
        "eos_ids": (9,), "bos_id": 9, "pad_id": 9, "mask_id": 9, "block_size": 8, "token_shift": True,
        "prompt_attention": "causal",
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(QwenConfig)}
    for name, value in changes.items():
        layers = {"layer_attention": ()} if name != "layer_attention" else {}
        blocks = {"block_size": None} if name == "moe" else {}
        config = dataclasses.replace(base, **layers, **blocks, **{name: value})
        written = config_to_hf(config, dtype="float32")
        rows = table(config, Layout.standard(written["model_type"], config))
        names = {stored for row in rows for stored in row.names(1)}
        assert getattr(config_from_hf(written, names), name) == value, name


def test_families_are_documented_by_the_error():
    with pytest.raises(ValueError) as error:
        read(model_type="new")
    assert all(name in str(error.value) for name in FAMILIES)


def test_rope_needs_the_trained_length_to_judge_query_scaling():
    config = {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}
    with pytest.raises(ValueError, match=r"llama_4_scaling_beta needs original"):
        rope_from_hf(config)
