"""Loading and saving whole models: configuration, weights, tokenizer and generation defaults."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from jaxmodels.cache import Scales
from jaxmodels.checkpoints.huggingface import (
    Checkpoint,
    read_json,
    replaced_directory,
    resolve,
    write_json,
    write_weights,
)
from jaxmodels.checkpoints.mapping import (
    check_names,
    common_dtype,
    flatten,
    load_arrays,
    to_tensors,
    unflatten,
)
from jaxmodels.decoding.sampling import SamplingOptions
from jaxmodels.quantization.load import dense_names, find_scheme, load_kv_scales, load_quantized, plan
from jaxmodels.quantization.save import config_block, quantized_tensors
from jaxmodels.quantization.source import Scheme
from jaxmodels.quantization.whole import round_head
from jaxmodels.qwen import load as qwen_load
from jaxmodels.qwen.model import CausalLM, build
from jaxmodels.sharding import param_shardings
from jaxmodels.sparse_attention import SkipAttention, SkipSoftmaxConfig
from jaxmodels.sparse_attention.config import KEY as SPARSE_ATTENTION
from jaxmodels.sparse_attention.config import PhaseName
from jaxmodels.tokenizer import Tokenizer
from pallas_kernels.attention.skip import DECODE_TILE, SkipTile
from pallas_kernels.quantized_matmul import QuantizedTensor

log = logging.getLogger("jaxstream")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says; None where it says nothing.

    `temperature` is 0 (greedy) unless the file says `do_sample: true`. Filters that are not set are off; the
    top_k = 50 that some libraries then assume is not.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GenerationDefaults":
        """From the content of generation_config.json; logs what would have an effect and is not implemented.

        Raises:
          ValueError: a value that no request could have; names the field.
        """
        without_effect = {
            "use_cache",
            "transformers_version",
            "bos_token_id",
            "max_length",
            "return_dict_in_generate",
        }
        neutral: tuple[Any, ...] = (None, False, 0, 1, 1.0, [], {})
        names = {field.name for field in dataclasses.fields(cls)} | {
            "do_sample",
            "eos_token_id",
            "pad_token_id",
        }
        ignored = sorted(
            key
            for key, value in config.items()
            if key not in names | without_effect and not key.startswith(("_", "output_")) and value not in neutral
        )
        if ignored:
            log.warning("generation_config.json: not implemented and ignored: %s", ", ".join(ignored))
        eos = config.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        pad_id = config.get("pad_token_id")
        if any(type(token) is not int for token in (*eos_ids, 0 if pad_id is None else pad_id)):
            raise ValueError(
                f"generation_config.json: eos_token_id {eos!r} and pad_token_id {pad_id!r} must be integers"
            )
        values: dict[str, Any] = {name: config.get(name) for name in names & config.keys() if name in SAMPLING}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if type(value) is not int and (type(value) is not float or name in ("top_k", "max_new_tokens")):
                kind = "an integer" if name in ("top_k", "max_new_tokens") else "a number"
                raise ValueError(f"generation_config.json: {name} must be {kind}; got {value!r}")
        most = given.pop("max_new_tokens", 1)
        if most < 1:
            raise ValueError(f"generation_config.json: max_new_tokens must be at least 1; got {most}")
        try:
            options: dict[str, Any] = {
                name: value if name == "top_k" else float(value) for name, value in given.items()
            }
            SamplingOptions(**options)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None
        if config.get("do_sample"):
            values["temperature"] = config.get("temperature", 1.0)
        elif "do_sample" in config:
            values["temperature"] = 0.0
        else:
            values.pop("temperature", None)
        return cls(
            **values,
            eos_ids=eos_ids,
            pad_id=pad_id,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        result: dict[str, Any] = {}
        if self.temperature is not None:
            result["do_sample"] = self.temperature > 0
        for name in SAMPLING:
            value = getattr(self, name)
            if value is not None and not (name == "temperature" and value == 0):
                result[name] = value
        if self.eos_ids:
            result["eos_token_id"] = self.eos_ids[0] if len(self.eos_ids) == 1 else [*self.eos_ids]
        if self.pad_id is not None:
            result["pad_token_id"] = self.pad_id
        return result


SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "max_new_tokens",
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded model.

    Attributes:
      lm: its pure functions.
      params: nested dict of arrays, layers stacked.
      tokenizer: None when the directory has no tokenizer.json.
      generation: defaults of generation_config.json; `eos_ids` and `pad_id` fall back to config.json and to
        the tokenizer.
      directory: where it was loaded from.
      hf_config: config.json as it is, for fields that do not change the model (how it was trained).
      sparse_attention: calibrated thresholds of config.json, or None; nothing skips unless it is asked to.
      quantization: how the checkpoint stores its linears, in words; None when they are dense.
      kv_scales: per layer, of keys and values in eight bits, if the checkpoint has them.
    """

    lm: CausalLM
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    directory: Path
    hf_config: Mapping[str, Any]
    sparse_attention: SkipSoftmaxConfig | None = None
    quantization: str | None = None
    kv_scales: Scales | None = None

    def skip(
        self,
        phase: PhaseName = "prefill",
        *,
        target_sparsity: float | None = None,
        threshold: float | None = None,
        scale_factor: float | None = None,
    ) -> SkipAttention:
        """Skip-softmax settings for passes over all tokens ("prefill") or for steps with a cache ("decode").

        A threshold or scale factor is used as it is. A target sparsity goes through the calibration in config.json;
        without any of the three, config.json's own target does. Tile and dense layers come from config.json too.

        Raises:
          ValueError: more than one was given, a value out of range, or config.json was not calibrated.
        """
        given = {"target_sparsity": target_sparsity, "threshold": threshold, "scale_factor": scale_factor}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"give one of target_sparsity, threshold and scale_factor; got {given}")
        block = self.sparse_attention
        if block is None and not {"threshold", "scale_factor"} & given.keys():
            raise ValueError(
                f"target_sparsity needs a calibrated {SPARSE_ATTENTION} in {self.directory / 'config.json'}, which has "
                f"none: python -m infer calibrate-sparsity --model {self.directory}"
            )
        default = DECODE_TILE if phase == "decode" else SkipTile()
        if block is None:
            return SkipAttention.create(threshold=threshold, scale_factor=scale_factor, tile=default)
        if block.disabled_until_timestep is not None:
            raise ValueError(
                f"{SPARSE_ATTENTION}: disabled_until_timestep={block.disabled_until_timestep} is for diffusion models"
            )
        if threshold is None and scale_factor is None:
            scale_factor = block.scale_factor(phase, target_sparsity)
        calibrated = block.decode if phase == "decode" else block.prefill
        names = [f"model.layers.{i}.self_attn" for i in range(self.config.layers)]
        return SkipAttention.create(
            threshold=threshold,
            scale_factor=scale_factor,
            tile=default if calibrated is None or calibrated.tile is None else calibrated.tile,
            dense_layers=block.dense_layers(names),
        )

    @property
    def config(self) -> Any:
        return self.lm.config

    def apply(self, params: dict[str, Any], tokens: Int[ArrayLike, "B T"], **options: Any) -> Float[Array, "B T V"]:
        """`lm.apply`: float32 logits, from any integer array of tokens."""
        return self.lm.apply(params, jnp.asarray(tokens, jnp.int32), **options)


def load_pretrained(
    directory_or_repo_id: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    mask_id: int | None = None,
    block_size: int | None = None,
    ignore_config: Collection[str] = (),
    head: Literal["int8", "fp8"] | None = None,
) -> Pretrained:
    """Reads a Hugging Face directory (config.json, safetensors, tokenizer), or a repository `org/name`.

    Linears that the checkpoint stores quantized (AWQ, GPTQ, ParoQuant, compressed-tensors, ModelOpt) stay so: their
    parameters are `QuantizedTensor`s, which `apply` and all drivers take as they take arrays.

    Weights are copied once, from the memory-mapped files into the arrays. With a mesh each process reads only
    the parts that its devices hold.

    Args:
      directory_or_repo_id: a local directory, else a repository in the Hugging Face cache or on the hub.
      dtype: float32, bfloat16 or float16 for all dense weights and so for activations; None takes the checkpoint's,
        which must then be one. For quantized checkpoints None reads float16 as bfloat16, because scaled and rotated
        activations may lie beyond float16.
      mesh: devices to shard over by `jaxmodels.sharding`; None puts everything on the default device.
      mask_id: mask token of a model whose config.json lacks it; never guessed.
      block_size: training block of a block-diffusion model whose config.json lacks it.
      ignore_config: fields of config.json that are unknown here and known to be without effect.
      head: round the vocabulary projection to eight bits, one scale per token (see `round_head`).

    Raises:
      ValueError: naming file, field or tensor, for an unknown architecture, an unimplemented value, missing
        or unused tensors, wrong shapes or dtypes, and damaged or unsafe files.
    """
    directory = resolve(directory_or_repo_id)
    before = directory.stat()
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{directory}: has no config.json")
    hf_config = read_json(config_path)
    try:
        qwen_load.check_fields(hf_config, ignore_config)  # before the weights: says what the directory is
        checkpoint = Checkpoint(directory)
        scheme = find_scheme(directory, hf_config)
        names = dense_names(scheme, checkpoint.names())
        config = qwen_load.config_from_hf(
            hf_config, names, mask_id=mask_id, block_size=block_size, ignore=ignore_config
        )
        block = hf_config.get(SPARSE_ATTENTION)
        unread = block is None or SPARSE_ATTENTION in ignore_config
        sparse_attention = None if unread else SkipSoftmaxConfig.from_hf(block)
    except ValueError as error:
        if str(error).startswith(str(directory)):
            raise
        raise ValueError(f"{config_path}: {error}") from None
    layout = qwen_load.Layout.find(names)
    config, ignored = _settle_head(checkpoint, config, layout)
    tokenizer = Tokenizer.from_directory(directory) if (directory / "tokenizer.json").is_file() else None
    generation = _generation(directory, config, tokenizer)
    if (after := directory.stat()).st_ino != before.st_ino or after.st_dev != before.st_dev:
        raise ValueError(f"{directory}: was replaced by another save while it was being opened; load it again")
    lm = build(config)
    params = load_params(checkpoint, lm, layout, dtype=dtype, mesh=mesh, ignored=ignored, scheme=scheme)
    rows = qwen_load.table(config, layout)
    if head is not None:
        lm, params = round_head(lm, params, head)
    return Pretrained(
        lm,
        params,
        tokenizer,
        generation,
        directory,
        hf_config,
        sparse_attention,
        quantization=None if scheme is None else scheme.title,
        kv_scales=None if scheme is None else load_kv_scales(checkpoint, rows, config.layers),
    )


def _settle_head(checkpoint: Checkpoint, config: Any, layout: qwen_load.Layout) -> tuple[Any, tuple[str, ...]]:
    """What to do with a head that is stored although config.json says that it is the embedding.

    A copy is left out. In the `diffusion_head` layout another matrix wins, because that class does not tie
    its head; elsewhere file and configuration contradict each other.
    """
    if not config.tied_head or layout.head is None:
        return config, ()
    if layout.head not in checkpoint.names():  # a quantized copy of the embedding
        return dataclasses.replace(config, tied_head=False), ()
    embed, head = (checkpoint.view(name) for name in (layout.prefix + "embed_tokens.weight", layout.head))
    same = embed.dtype == head.dtype and embed.shape == head.shape
    if same and all(np.array_equal(embed[i : i + 4096], head[i : i + 4096]) for i in range(0, len(embed), 4096)):
        return config, (layout.head,)
    if layout.head == "diffusion_head.weight":
        return dataclasses.replace(config, tied_head=False), ()
    raise ValueError(
        f"{checkpoint}: config.json has tie_word_embeddings true, but {layout.head!r} differs from the embedding"
    )


def load_params(
    checkpoint: Checkpoint,
    lm: CausalLM,
    layout: qwen_load.Layout,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    ignored: Collection[str] = (),
    scheme: Scheme | None = None,
) -> dict[str, Any]:
    """The parameters of `lm` from the tensors of `checkpoint`; see `load_pretrained`."""
    layers = lm.config.layers
    parts = plan(scheme, checkpoint, qwen_load.table(lm.config, layout), layers)
    check_names(checkpoint, parts.names, (*qwen_load.IGNORED_TENSORS, *ignored))
    if dtype is None:
        dense = [name for row in parts.dense for name in row.names(layers)]
        dtype = common_dtype(checkpoint, dense)
        if scheme is not None and dtype == np.float16:
            dtype = jnp.bfloat16  # scaled and rotated activations may lie beyond float16
    shapes = {path: leaf.shape for path, leaf in flatten(jax.eval_shape(lambda: lm.init(jax.random.key(0)))).items()}
    shardings = None if mesh is None else flatten(param_shardings(lm, mesh))
    own = {row.path: shapes[row.path] for row in parts.dense}
    arrays: dict[tuple[str, ...], Any] = dict(
        load_arrays(checkpoint, parts.dense, own, dtype=jnp.dtype(dtype), shardings=shardings)
    )
    if scheme is not None:
        for row in parts.quantized:
            sharding = None if shardings is None else shardings[row.path]
            arrays[row.path] = load_quantized(scheme, checkpoint, row, shapes[row.path], sharding)
    return unflatten(arrays)


def _generation(directory: Path, config: Any, tokenizer: Tokenizer | None) -> GenerationDefaults:
    path = directory / "generation_config.json"
    defaults = GenerationDefaults.from_hf(read_json(path)) if path.is_file() else GenerationDefaults()
    if not defaults.eos_ids:
        own = tokenizer.eos_ids if tokenizer is not None else ()
        defaults = dataclasses.replace(defaults, eos_ids=config.eos_ids or own)
    if defaults.pad_id is None:
        own_pad = tokenizer.pad_id if tokenizer is not None else None
        defaults = dataclasses.replace(defaults, pad_id=config.pad_id if config.pad_id is not None else own_pad)
    return defaults


def save_pretrained(
    directory: str | os.PathLike,
    lm: CausalLM,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    generation: GenerationDefaults | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    family: str | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face directory that `load_pretrained` reads back, and transformers does.

    Quantized parameters go into the layouts of AWQ (int4), ParoQuant (int4 with rotations) or compressed-tensors (int8,
    fp8, nvfp4).

    The directory appears, or replaces the previous model of that name, in one step when everything is on
    disk; after any failure the previous one is untouched. Other files in it (notes, a tokenizer if none is
    given) stay. With several processes all must call this; the first one writes.

    Args:
      directory: where to; must not hold subdirectories.
      lm: the model.
      params: its parameters with stacked layers, on any devices.
      tokenizer: written beside the weights.
      generation: written as generation_config.json; None writes the end and padding tokens of the config
        only.
      dtype: float32, bfloat16 or float16 for all dense weights; None keeps each array's.
      max_shard_bytes: larger models are split into files of at most this size, with an index.
      family: "qwen2", "qwen3", "qwen3_moe", "qwen_moba" or "edlm"; None takes "qwen_moba" for models with layers that
        select blocks, convolve their keys or rotate nothing, "edlm" (Efficient-DLM's layout, `encoder.` and
        `diffusion_head`) for models with a block size, else the Qwen that fits. transformers reads qwen2, qwen3 and
        qwen3_moe, the only one for mixtures of experts.
      extra_config: further fields for config.json that do not change the model, such as
        `tok_mask_half_life_ratio`.

    Raises:
      ValueError: parameters that are not those of `lm`, a configuration that the layout cannot express,
        unknown fields in `extra_config`.
      OSError: the disk is full, or the directory cannot be written.
    """
    directory = Path(directory).expanduser()
    unknown = sorted(set(extra_config or {}) - qwen_load.IGNORED)
    if unknown:
        raise ValueError(f"extra_config field {unknown[0]!r} is not one of {sorted(qwen_load.IGNORED)}")
    leaves = flatten(params)
    expected = flatten(jax.eval_shape(lambda: lm.init(jax.random.key(0))))
    for path, leaf in expected.items():
        shape = _shape(leaves[path]) if path in leaves else None
        if shape != leaf.shape:
            found = "is missing" if shape is None else f"has shape {shape}"
            raise ValueError(f"parameter {'.'.join(path)!r} {found}; the model has {leaf.shape}")
    stored = jnp.dtype(dtype if dtype is not None else leaves[("embed",)].dtype)
    hf_config = qwen_load.config_to_hf(lm.config, dtype=stored.name, family=family)
    hf_config |= {key: value for key, value in (extra_config or {}).items() if value is not None}
    layout = qwen_load.Layout.standard(hf_config["model_type"], lm.config)
    rows = qwen_load.table(lm.config, layout)
    quantized = {row.path: leaves.pop(row.path) for row in rows if isinstance(leaves[row.path], QuantizedTensor)}
    dense = [row for row in rows if row.path not in quantized]
    tensors = to_tensors(dense, unflatten(leaves), None if dtype is None else stored, _fetch)
    if quantized:
        hf_config["quantization_config"] = config_block(
            {".".join(path): weight for path, weight in quantized.items()}, dense
        )
        tensors |= quantized_tensors([row for row in rows if row.path in quantized], quantized, _fetch)
    if jax.process_index() != 0:
        write_weights(directory, tensors, max_shard_bytes=max_shard_bytes, write=False)
    else:
        generation = generation or GenerationDefaults(eos_ids=lm.config.eos_ids, pad_id=lm.config.pad_id)
        with replaced_directory(directory) as new:
            write_weights(new, tensors, max_shard_bytes=max_shard_bytes)
            write_json(new / "config.json", hf_config)
            write_json(new / "generation_config.json", generation.to_hf())
            if tokenizer is not None:
                tokenizer.save(new)
    if jax.process_count() > 1:  # nobody goes on to load what is not there yet
        multihost_utils.sync_global_devices("save_pretrained")


def _shape(leaf: Any) -> tuple[int, ...]:
    """Shape of a parameter; of a stack of quantized ones with its first axis."""
    return (*leaf.codes.shape[:-2], *leaf.shape) if isinstance(leaf, QuantizedTensor) else tuple(leaf.shape)


def _fetch(array: Any, index: tuple[int, ...]) -> np.ndarray:
    """One parameter, or what a stacked one has at an index, on the host; collective if other processes hold parts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not isinstance(array.sharding, NamedSharding):
            raise ValueError(f"parameters over several processes need a NamedSharding; got {array.sharding}")
        return np.asarray(_gather(array.sharding.mesh)(array, index).addressable_data(0))
    if not index:
        return np.asarray(array)
    if isinstance(array, jax.Array) and (len(array.devices()) > 1 or next(iter(array.devices())).platform != "cpu"):
        return np.asarray(array[index])  # one layer at a time off the device
    return np.asarray(np.asarray(array)[index])  # of a stack of numbers, an array without axes


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable:
    """Brings an array, or what it has at an index of its first axes, to every device; compiled once per shape."""
    one = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.jit(
        lambda array, index: functools.reduce(one, index, array), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
