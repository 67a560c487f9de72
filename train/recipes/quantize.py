"""Recipe `quantize`: a model whose weights are rounded to the nearest codes; no data, no training."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Round the linears of a model to the nearest codes of a format, and write a checkpoint that other tools read.

    python -m train quantize --model DIR --out DIR --format int8

    int4 becomes an AWQ checkpoint, the others become compressed-tensors. For int4, `paroquant` loses less.
    """

    model: str
    """Hugging Face directory (or org/name) with config.json and dense weights."""
    out: Path
    """Where the quantized model goes."""
    format: Literal["int4", "int8", "fp8", "nvfp4"] = "int8"
    """int4: groups of inputs share a scale. int8, fp8: one scale per output. nvfp4: blocks of 16 inputs."""
    group_size: int | None = None
    """Inputs that share a scale, int4 only; None: 128, -1: all."""
    symmetric: bool = False
    """int4 without zeros."""
    round_inputs: bool = False
    """Round activations too, token by token, and multiply in eight bits (int8 and fp8 only)."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of what stays dense in the written model; None: that of the original."""

    def __post_init__(self):
        if self.format != "int4" and (self.group_size is not None or self.symmetric):
            raise ValueError(f"group_size and symmetric are options of int4; format is {self.format}")
        if self.round_inputs and self.format not in ("int8", "fp8"):
            raise ValueError(f"round_inputs needs format int8 or fp8; got {self.format}")


def main(config: Quantize) -> int:
    """Runs the recipe; 0 when the model is written."""
    import functools

    import jax
    import jax.numpy as jnp

    from jaxmodels import load_pretrained, save_pretrained
    from jaxmodels.checkpoints.mapping import flatten
    from jaxmodels.quantization import round_params
    from pallas_kernels.quantized_matmul import dequantize
    from pallas_kernels.quantized_matmul.tensor import Activations
    from train.mesh import make_mesh
    from train.metrics import Reporter

    reporter = Reporter()
    model = load_pretrained(config.model, mesh=make_mesh(config.mesh) if jax.device_count() > 1 else None)
    if model.quantization is not None:
        raise ValueError(f"{config.model} is quantized already ({model.quantization}); give the dense model")
    kind: Activations | None = None
    if config.round_inputs:
        kind = "int8" if config.format == "int8" else "fp8"
    round_all = functools.partial(
        round_params, model.lm, format=config.format, group_size=config.group_size, symmetric=config.symmetric,
        activations=kind,
    )  # fmt: skip
    quantized = jax.jit(lambda params: round_all(params))(model.params)
    save_pretrained(
        config.out, model.lm, quantized, tokenizer=model.tokenizer, generation=model.generation,
        dtype=config.dtype or model.params["embed"].dtype.name,
    )  # fmt: skip

    @jax.jit
    def noise(weight, rounded):
        """Signal-to-noise ratio in decibels, of one weight or of those of all experts together."""

        def energies(weight, rounded):
            dense = weight.astype(jnp.float32)
            return (dense**2).sum(), ((dense - dequantize(rounded)) ** 2).sum()

        if weight.ndim > rounded.ndim:
            signal, lost = jax.lax.map(
                lambda expert: energies(weight[expert], rounded.of_expert(expert)), jnp.arange(len(weight))
            )
        else:
            signal, lost = energies(weight, rounded)
        return 10 * jnp.log10(signal.sum() / lost.sum())

    dense, rounded = flatten(model.params), flatten(quantized)
    for path in model.lm.linears:
        ratios = [
            float(noise(dense[path][layer], rounded[path].of_layer(layer))) for layer in range(model.config.layers)
        ]
        reporter.line(
            f"{'.'.join(path[1:]):12}  weight SNR {sum(ratios) / len(ratios):.1f} dB on average, {min(ratios):.1f} in "
            f"layer {ratios.index(min(ratios))}"
        )
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (model.params, quantized)]
    reporter.line(f"size  {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB")
    print(config.out)
    return 0
