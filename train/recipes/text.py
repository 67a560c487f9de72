"""What recipes on text have in common: opening the model they start from and the rows they train on."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:  # importing a recipe must stay quick: `--help` imports it
    from jax.sharding import Mesh

    from jaxmodels.pretrained import GenerationDefaults
    from jaxmodels.qwen.model import CausalLM
    from jaxmodels.tokenizer import Tokenizer
    from train.config import RunConfig
    from train.data import RowStore

__all__ = [
    "Flat",
    "MobaLayersConfig",
    "Preset",
    "RowsConfig",
    "StartModel",
    "TextRows",
    "open_model",
    "open_preset",
    "open_rows",
    "route",
]

Preset = Literal[
    "moba-tiny",
    "moba-340m",
    "moba-1b",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen3-0.6b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-30b-a3b",
]
"""Architectures to start from with random weights: class methods of `jaxmodels.qwen.QwenConfig`."""
VOCAB_MULTIPLE = 128
"""Rows of a new embedding come in so many, which devices share evenly and tiles of products fill."""

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
"""A nested configuration whose flags have no prefix: --steps, not --run.steps. In TOML it is a table as usual."""


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How documents become rows of tokens."""

    seq_len: int = 1024
    """Tokens per row; several documents share a row and do not see each other."""
    store: Path | None = None
    """Where the packed rows are kept; None: rows/ in the run directory."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out, chosen by name; 0: no evaluation."""
    split_seed: int = 0
    """Another seed holds out other documents."""
    text_column: str = "text"
    """Field of JSONL and column of Parquet files that holds the text."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a file that cannot be read."""
    cuts: int = 1
    """How many times the tokens are cut into rows, each time at another offset."""


@dataclasses.dataclass(frozen=True)
class MobaLayersConfig:
    """Layers of a dense model that select blocks from now on (docs/moba.md)."""

    layers: tuple[int, ...] = ()
    """Which, counted from 0; they must have full attention. None named: the model stays as it is."""
    block_size: int = 128
    """Keys of a block."""
    top_k: int = 8
    """Blocks that each query selects, its own among them."""
    key_conv: int | None = None
    """Taps of a convolution over the keys of these layers, which begin at 0; None: there is none."""

    def __post_init__(self):
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"moba.layers must be different ones; got {self.layers}")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"moba.{field.name} must be at least 1; got {value}")
            if not self.layers and value != field.default:
                raise ValueError(f"moba.{field.name}={value} does nothing without moba.layers")


@dataclasses.dataclass(frozen=True)
class StartModel:
    """The model a run starts from.

    Attributes:
        lm: its pure functions.
        create: its weights; None: random ones.
        tokenizer: never None.
        generation: kept for the export.
        hf_config: content of its config.json; empty for a preset.
        dtype: name of the dtype its weights are stored in.
    """

    lm: "CausalLM"
    create: Callable[[], Any] | None
    tokenizer: "Tokenizer"
    generation: "GenerationDefaults | None"
    hf_config: dict[str, Any]
    dtype: str


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Packed rows: what to train on, and what is held out (None if nothing is)."""

    train: "RowStore"
    validation: "RowStore | None"

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued run must find again."""
        return {"fingerprint": self.train.fingerprint, "seq_len": self.train.seq_len}

    def batches(self, run: "RunConfig", mesh: "Mesh") -> Any:
        """This process's part of every batch, endless, as `train.loop.fit` takes it."""
        from train.data import batches
        from train.mesh import data_shard

        index, count = data_shard(mesh)
        return batches(self.train, global_batch=run.batch_size, seed=run.seed, process_index=index, process_count=count)

    def held_out(self, run: "RunConfig", mesh: "Mesh") -> Callable[[], Iterable[dict]] | None:
        """Makes this process's part of the held-out batches, the same ones every time."""
        if self.validation is None:
            return None
        from train.data import evaluation_batches
        from train.mesh import data_shard

        index, count = data_shard(mesh)
        return functools.partial(
            evaluation_batches,
            self.validation,
            global_batch=run.batch_size,
            max_rows=run.eval_batches * run.batch_size,
            process_index=index,
            process_count=count,
        )


def open_model(
    init: str,
    mesh: "Mesh",
    *,
    random_weights: bool = False,
    mask_id: int | None = None,
    block_size: int | None = None,
) -> StartModel:
    """The model of a Hugging Face directory or repository, its weights sharded over the mesh.

    With `random_weights` only config.json and the tokenizer are read.

    Raises:
        ValueError: see `load_pretrained`; there is no tokenizer; or the weights are quantized.
    """
    from jaxmodels import load_pretrained
    from jaxmodels.checkpoints.huggingface import read_json, resolve
    from jaxmodels.qwen import build
    from jaxmodels.qwen.load import config_from_hf
    from jaxmodels.tokenizer import Tokenizer

    directory = resolve(init)
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(f"{directory}: has no tokenizer.json, which training on text needs")
    if random_weights:
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory}: has no config.json")
        hf_config = dict(read_json(directory / "config.json"))
        names = ("model.embed_tokens.weight",)  # no weights there: the family decides biases and norms
        config = config_from_hf(hf_config, names, mask_id=mask_id, block_size=block_size)
        tokenizer = Tokenizer.from_directory(directory)
        return StartModel(build(config), None, tokenizer, None, hf_config, "float32")
    loaded = load_pretrained(init, mesh=mesh, mask_id=mask_id, block_size=block_size)
    if loaded.quantization is not None:
        raise ValueError(
            f"{init} is quantized ({loaded.quantization}), and codes cannot be trained; give dense weights"
        )
    assert loaded.tokenizer is not None  # checked above
    dtype = loaded.params["embed"].dtype.name
    weights = [loaded.params]  # handed over once, so that the run does not keep a second copy alive
    return StartModel(loaded.lm, weights.pop, loaded.tokenizer, loaded.generation, dict(loaded.hf_config), dtype)


def open_preset(preset: Preset, tokenizer: str) -> StartModel:
    """The architecture of a preset, to be filled with random weights, for the vocabulary of a tokenizer.

    The embedding has a row for each token, rounded up to a multiple of 128; beginning, end and padding are those that
    the tokenizer names.

    Args:
        preset: which.
        tokenizer: directory (or org/name) with tokenizer.json and tokenizer_config.json; weights are not read.

    Raises:
        ValueError: there is no tokenizer, or it names no end token.
    """
    from jaxmodels.checkpoints.huggingface import resolve
    from jaxmodels.qwen import QwenConfig, build
    from jaxmodels.tokenizer import Tokenizer

    directory = resolve(tokenizer)
    found = Tokenizer.from_directory(directory)
    if not found.eos_ids:
        raise ValueError(f"{directory}: tokenizer_config.json names no eos_token, which separates documents")
    config = dataclasses.replace(
        getattr(QwenConfig, preset.replace("-", "_").replace(".", "_"))(),
        vocab_size=-(-found.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        eos_ids=found.eos_ids,
        bos_id=found.bos_id,
        pad_id=found.pad_id,
    )
    return StartModel(build(config), None, found, None, {}, "float32")


def route(model: StartModel, moba: MobaLayersConfig) -> StartModel:
    """The model with blocks to select in the named layers; see `jaxmodels.qwen.route_layers`."""
    if not moba.layers:
        return model
    import jax

    from jaxmodels.qwen import MobaConfig, build, route_layers

    def routed(params: Any) -> Any:
        blocks = MobaConfig(moba.block_size, moba.top_k)
        return route_layers(model.lm.config, params, moba.layers, moba=blocks, key_conv=moba.key_conv)

    config, _ = routed(jax.eval_shape(lambda: model.lm.init(jax.random.key(0))))
    create = model.create
    return dataclasses.replace(model, lm=build(config), create=create and (lambda: routed(create())[1]))


def open_rows(
    data: tuple[Path, ...], rows: RowsConfig, model: StartModel, directory: Path, *, align: int = 1
) -> TextRows:
    """Packed rows of the text in `data`, built by process 0 unless they are there already.

    `data` may also be one directory that `build_store` has written.

    Args:
        data: files and directories of text, JSONL or Parquet.
        rows: packing.
        model: gives tokenizer, end token, and the limits to check against.
        directory: the run's; `rows.store` overrides where the rows go.
        align: documents start at multiples of this column (a block size).
    """
    from train.data import RowStore, StoreConfig, open_or_build
    from train.data.rows import VALIDATION
    from train.distributed import on_main

    config = model.lm.config
    if rows.seq_len > config.max_positions:
        raise ValueError(
            f"rows.seq_len must be at most the model's {config.max_positions} positions; got {rows.seq_len}"
        )
    if len(data) == 1 and (data[0] / "manifest.json").is_file():
        store = data[0]
    else:
        if not config.eos_ids:
            raise ValueError("the model's config.json has no eos_token_id, which separates documents")
        store = rows.store or Path(directory) / "rows"
        settings = StoreConfig(
            rows.seq_len,
            config.eos_ids[0],
            align=align,
            cuts=rows.cuts,
            validation_fraction=rows.validation_fraction,
            split_seed=rows.split_seed,
        )
        on_main(
            lambda: open_or_build(
                store,
                data,
                model.tokenizer.backend,
                settings,
                text_column=rows.text_column,
                on_error=rows.on_error,
            )
        )
    train = RowStore(store)
    vocab = train.manifest["vocab_size"]
    if vocab > config.vocab_size:
        raise ValueError(f"the rows use {vocab} token ids, the model has only {config.vocab_size}")
    if train.seq_len != rows.seq_len:
        raise ValueError(f"rows.seq_len is {rows.seq_len}, but {store} holds rows of {train.seq_len} tokens")
    held_out = None
    if rows.validation_fraction > 0:
        try:
            held_out = RowStore(store, VALIDATION)
        except ValueError as error:
            raise ValueError(f"{error}; raise --rows.validation-fraction, or set it to 0 for no evaluation") from None
    return TextRows(train, held_out)
