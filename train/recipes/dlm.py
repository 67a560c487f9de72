"""Recipe `dlm`: continues the training of an autoregressive model until it decodes in blocks."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.config import HostsConfig, MeshConfig, OptimConfig, RunConfig, to_json
from train.objectives.config import DiffusionObjective
from train.recipes.text import Flat, RowsConfig, open_model, open_rows

if TYPE_CHECKING:  # importing a recipe must stay quick: `--help` imports it
    from jax.sharding import Mesh

    from train.loop import Weights
    from train.recipes.text import StartModel


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Train low-rank updates of all projections instead of the projections themselves."""

    rank: int = 0
    """Rank of the updates; 0: all weights are trained. Embedding, head, norms and biases are always trained."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None: twice the rank."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank must not be negative; got {self.rank}")
        if self.alpha is not None and not (self.rank > 0 and self.alpha > 0.0):
            raise ValueError(f"lora.alpha must be positive and needs lora.rank; got {self.alpha} with rank {self.rank}")

    @property
    def scale(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclasses.dataclass(frozen=True)
class DLM:
    """Convert an autoregressive language model into a block-diffusion one.

    Starts from a Hugging Face directory and writes one that `python -m infer text` decodes in blocks:

    python -m train dlm --init DIR --data FILES --mask-id ID --directory runs/mine --steps 2000

    The same command continues an interrupted run. Reported with each evaluation: the unbiased likelihood bound in nats
    per token, also by offset in the block, and how far the weights have moved. The training loss is no likelihood.
    """

    init: str
    """Hugging Face directory (or org/name) with config.json, tokenizer.json and weights."""
    data: tuple[Path, ...]
    """Files or directories of text, JSONL or Parquet; or one directory of packed rows."""
    mask_id: int | None = None
    """An unused token of the tokenizer that will stand for masked text; None: as in config.json. Never guessed."""
    random_weights: bool = False
    """Start from random weights of that configuration; the directory then needs none."""
    objective: Flat[DiffusionObjective] = dataclasses.field(default_factory=DiffusionObjective)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    rows: RowsConfig = dataclasses.field(default_factory=RowsConfig)
    run: Flat[RunConfig] = dataclasses.field(default_factory=RunConfig)
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=1e-5))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: Flat[HostsConfig] = dataclasses.field(default_factory=HostsConfig)
    eval_block: int | None = None
    """Block length of the bound; None: the training block (patterns without blocks: the whole row)."""
    eval_samples: int = 1
    """Draws of the bound per held-out row."""
    drift: bool = True
    """Report how far the weights have moved; keeps a copy of the initial ones."""
    remat: Literal["none", "full", "dots", "attention"] = "none"
    """What blocks keep for the backward pass: everything; nothing; products with weights; attention only."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)**2."""
    loss_chunk: int | None = None
    """Positions whose logits are in memory at once; None: chosen by the vocabulary."""
    export: Path | None = None
    """Where the trained model goes; None: model/ in the run directory."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported weights; None: that of the initial ones."""

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative; got {self.z_loss}")
        for name in ("loss_chunk", "eval_block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None; got {value}")
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be at least 1; got {self.eval_samples}")


def main(config: DLM) -> int:
    """Runs the recipe; 0 when the model is exported, 1 when the run was interrupted."""
    from jaxmodels import save_pretrained
    from jaxmodels.qwen import build
    from jaxmodels.qwen.load import config_to_hf
    from train import distributed
    from train.loop import fit
    from train.mesh import check_batch, data_shard, make_mesh

    distributed.initialize(config.hosts)
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.run.batch_size, config.run.accumulate)
    objective = config.objective
    block = objective.block_size if objective.in_blocks else None
    model = open_model(
        config.init, mesh, random_weights=config.random_weights, mask_id=config.mask_id, block_size=block
    )
    if model.lm.config.mask_id is None:
        raise ValueError(
            f"mask_id: {config.init}/config.json names no mask_token_id; give --mask-id, an unused id of the tokenizer"
        )
    settings = dataclasses.replace(
        model.lm.config,
        block_size=block,
        token_shift=objective.token_shift,
        prompt_attention=_prompt_attention(objective),
    )
    model = dataclasses.replace(model, lm=build(settings))
    config_to_hf(model.lm.config, dtype=model.dtype)  # refuses now what could not be exported in the end
    rows = open_rows(config.data, config.rows, model, config.run.directory, align=block or 1)
    weights, initial, merged = _weights(config, model, mesh)
    _, shards = data_shard(mesh)
    shards = max(shards, mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1))
    loss_fn, eval_fn = _losses(config, model.lm, shards)

    def with_frozen(loss: Any) -> Any:
        if not config.lora.rank:
            return loss
        return lambda params, batch, key, frozen: loss(merged(params, frozen), batch, key)

    def drift(params: Any) -> dict[str, Any]:
        from train.drift import weight_drift

        return weight_drift(merged(params, weights.frozen), initial)

    result = fit(
        config.run,
        config.optim,
        mesh,
        weights,
        with_frozen(loss_fn),
        rows.batches(config.run, mesh),
        identity={
            "recipe": "dlm",
            "init": config.init,
            "random_weights": config.random_weights,
            "model": to_json(settings),
            "data": rows.identity,
            "objective": to_json(objective),
            "lora": to_json(config.lora),
            "z_loss": config.z_loss,
        },
        config=config,
        eval_data=rows.held_out(config.run, mesh),
        eval_fn=with_frozen(eval_fn),
        on_eval=drift if config.drift else None,
    )
    if result.interrupted:
        return 1
    directory = config.export or config.run.directory / "model"
    save_pretrained(
        directory,
        model.lm,
        merged(result.state.params, weights.frozen),
        tokenizer=model.tokenizer,
        generation=model.generation,
        dtype=config.export_dtype or model.dtype,
    )
    if distributed.is_main():
        print(directory)
    return 0


def _prompt_attention(objective: DiffusionObjective) -> Literal["bidirectional", "block_causal", "causal"]:
    """How clean text saw itself in training."""
    if objective.joint_weight is not None or objective.pattern == "autoregressive":
        return "causal"
    return "block_causal" if objective.in_blocks else "bidirectional"


def _losses(config: DLM, lm: Any, shards: int) -> tuple[Any, Any]:
    """What is minimised and what is evaluated."""
    from train.objectives.block_diffusion import make_ar_loss, make_block_diffusion_loss, make_bound_loss

    objective = config.objective
    part = config.run.batch_size // config.run.accumulate
    loss_fn = make_block_diffusion_loss(
        lm,
        objective,
        chunk_size=config.loss_chunk,
        z_loss=config.z_loss,
        remat=config.remat,
        gather_groups=shards if part % shards == 0 else 1,
    )
    if objective.pattern == "autoregressive":
        return loss_fn, make_ar_loss(lm, chunk_size=config.loss_chunk)
    block = config.eval_block or (objective.block_size if objective.in_blocks else None)
    bound = make_bound_loss(
        lm,
        block_size=block,
        token_shift=objective.token_shift,
        num_samples=config.eval_samples,
        chunk_size=config.loss_chunk,
    )
    return loss_fn, bound


def _weights(config: DLM, model: "StartModel", mesh: "Mesh") -> tuple["Weights", Any, Any]:
    """(what is trained, the initial parameters if drift is reported, function to ordinary parameters)."""
    import jax
    import jax.numpy as jnp

    from jaxmodels import lora
    from train.loop import Weights, compute_dtype, weights_of

    whole = weights_of(model.lm, mesh, model.create, seed=config.run.seed)
    rank = config.lora.rank
    if not (rank or config.drift):
        return whole, None, lambda params, frozen: params
    initial = whole.create()
    if not rank:
        return dataclasses.replace(whole, create=lambda: initial), initial, lambda params, frozen: params

    frozen_shapes, dense_shapes = lora.split(whole.shapes)
    shapes = {"adapters": lora.adapter_shapes(frozen_shapes, rank), "dense": dense_shapes}
    dtype = jnp.dtype(compute_dtype(config.run.compute_dtype))
    frozen, dense = lora.split(initial)
    frozen = jax.tree.map(lambda a, s: jax.device_put(a.astype(dtype), s.sharding), frozen, frozen_shapes)

    def create() -> Any:
        key = jax.random.fold_in(jax.random.key(config.run.seed), 1)
        return {"adapters": lora.init_adapters(key, shapes["adapters"]), "dense": dense}

    def merged(params: Any, frozen: Any) -> Any:
        return lora.merge(frozen, params["dense"], params["adapters"], rank=rank, alpha=config.lora.scale)

    return Weights(shapes, create, frozen), (initial if config.drift else None), merged
