"""Recipe `lm`: the ordinary next-token objective on packed text."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.config import HostsConfig, MeshConfig, OptimConfig, RunConfig, to_json
from train.recipes.text import (
    Flat,
    MobaLayersConfig,
    Preset,
    RowsConfig,
    open_model,
    open_preset,
    open_rows,
    route,
)


@dataclasses.dataclass(frozen=True)
class LM:
    """Train or fine-tune an autoregressive language model on text.

    Starts from a Hugging Face directory, or from random weights of a preset, and writes such a directory:

    python -m train lm --init DIR --data FILES --directory runs/mine --steps 2000
    python -m train lm --preset moba-340m --tokenizer DIR --data FILES --directory runs/mine --steps 2000

    The same command continues an interrupted run. Several hosts: the same command on each of them, with
    --coordinator, --num-processes and --process-id, or under srun without.
    """

    data: tuple[Path, ...]
    """Files or directories of text, JSONL or Parquet; or one directory of packed rows."""
    init: str | None = None
    """Hugging Face directory (or org/name) with config.json, tokenizer.json and weights. Either this or a preset."""
    preset: Preset | None = None
    """Start from random weights of a known architecture, with the vocabulary of --tokenizer."""
    tokenizer: str | None = None
    """Directory (or org/name) with the tokenizer.json and tokenizer_config.json of a preset's vocabulary."""
    moba: MobaLayersConfig = dataclasses.field(default_factory=MobaLayersConfig)
    random_weights: bool = False
    """Start from random weights of the configuration in --init; the directory then needs none."""
    rows: RowsConfig = dataclasses.field(default_factory=RowsConfig)
    run: Flat[RunConfig] = dataclasses.field(default_factory=RunConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: Flat[HostsConfig] = dataclasses.field(default_factory=HostsConfig)
    remat: Literal["none", "full", "dots", "attention"] = "none"
    """What blocks keep for the backward pass: everything; nothing; products with weights; attention only."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)**2, which keeps logits from drifting (1e-4 is usual)."""
    loss_chunk: int | None = None
    """Positions whose logits are in memory at once; None: chosen by the vocabulary."""
    skip_threshold: float | None = None
    """Train with skip-softmax attention: leave out tiles whose every weight is below this share of the largest so far,
    in (0, 1); forward and backward alike. None: dense. Evaluation is dense."""
    skip_rows: int = 64
    """Consecutive tokens of a head that vote together on a tile."""
    skip_width: int = 128
    """Keys of a tile."""
    export: Path | None = None
    """Where the trained model goes; None: model/ in the run directory."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights; None: that of the initial ones."""

    def __post_init__(self):
        if (self.init is None) == (self.preset is None):
            given = "neither" if self.init is None else "both"
            raise ValueError(f"give --init DIR or --preset NAME, one of them; got {given}")
        if self.preset is None and self.tokenizer is not None:
            raise ValueError("--tokenizer belongs to --preset; with --init the tokenizer is that of the directory")
        if self.preset is not None and self.tokenizer is None:
            raise ValueError(f"--preset {self.preset} needs --tokenizer DIR, which gives the vocabulary")
        if self.preset is not None and self.random_weights:
            raise ValueError("--random-weights belongs to --init; a preset has no other weights")
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative; got {self.z_loss}")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(f"loss_chunk must be at least 1 or None; got {self.loss_chunk}")
        if self.skip_threshold is not None and not 0.0 < self.skip_threshold < 1.0:
            raise ValueError(f"skip_threshold must lie in (0, 1) or be None; got {self.skip_threshold}")
        for name in ("skip_rows", "skip_width"):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
            if self.skip_threshold is None and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)} does nothing without skip_threshold")


def main(config: LM) -> int:
    """Runs the recipe; 0 when the model is exported, 1 when the run was interrupted."""
    from jaxmodels import save_pretrained
    from jaxmodels.qwen.load import config_to_hf
    from jaxmodels.sparse_attention import SkipAttention
    from pallas_kernels.attention.skip import SkipTile
    from train import distributed
    from train.loop import fit, weights_of
    from train.mesh import check_batch, make_mesh
    from train.objectives.next_token import make_next_token_loss

    distributed.initialize(config.hosts)
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.run.batch_size, config.run.accumulate)
    if config.preset is not None:
        assert config.tokenizer is not None  # checked above
        model = open_preset(config.preset, config.tokenizer)
    else:
        assert config.init is not None
        model = open_model(config.init, mesh, random_weights=config.random_weights)
    model = route(model, config.moba)
    config_to_hf(model.lm.config, dtype=model.dtype)  # refuses now what could not be exported in the end
    rows = open_rows(config.data, config.rows, model, config.run.directory)
    skip = None
    if config.skip_threshold is not None:
        tile = SkipTile(config.skip_rows, config.skip_width)
        skip = SkipAttention.create(threshold=config.skip_threshold, tile=tile)
    loss_fn = make_next_token_loss(
        model.lm, z_loss=config.z_loss, chunk_size=config.loss_chunk, remat=config.remat, skip=skip
    )
    result = fit(
        config.run,
        config.optim,
        mesh,
        weights_of(model.lm, mesh, model.create, seed=config.run.seed),
        loss_fn,
        rows.batches(config.run, mesh),
        identity={
            "recipe": "lm",
            **(
                {"init": config.init, "random_weights": config.random_weights}
                if config.preset is None
                else {"preset": config.preset}
            ),
            "model": to_json(model.lm.config),
            "data": rows.identity,
            "z_loss": config.z_loss,
            **({} if skip is None else {"skip": to_json(dataclasses.asdict(skip))}),
        },
        config=config,
        eval_data=rows.held_out(config.run, mesh),
        eval_fn=make_next_token_loss(model.lm, chunk_size=config.loss_chunk),
    )
    if result.interrupted:
        return 1
    directory = config.export or config.run.directory / "model"
    save_pretrained(
        directory,
        model.lm,
        result.state.params,
        tokenizer=model.tokenizer,
        generation=model.generation,
        dtype=config.export_dtype or model.dtype,
    )
    if distributed.is_main():
        print(directory)
    return 0
