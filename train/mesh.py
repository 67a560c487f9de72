"""Devices as a mesh of (data, fsdp, tensor), and where parameters, optimiser state and batches live on it."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from train.config import MeshConfig
from train.state import TrainState

__all__ = [
    "AXES",
    "batch_sharding",
    "check_batch",
    "data_shard",
    "global_batch",
    "make_mesh",
    "replicated",
    "state_shardings",
]

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # how the rows of a batch are spread


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices of all processes (or over `devices`).

    Neighbouring devices, and so those of one process, share the tensor axis first, then fsdp, then data.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data is None else config.data
    if data * inner != len(devices):
        asked = "the rest" if config.data is None else config.data
        raise ValueError(
            f"mesh.data * mesh.fsdp * mesh.tensor must equal the {len(devices)} devices; got "
            f"{asked} * {config.fsdp} * {config.tensor}"
        )
    shape = (data, config.fsdp, config.tensor)
    # Auto axes: the compiler propagates shardings, so model code names none.
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; every device of the tensor axis has the same rows."""
    return NamedSharding(mesh, ROWS)


def state_shardings(
    mesh: Mesh, params: Any, optimizer: optax.GradientTransformation, param_shardings: Any
) -> TrainState:
    """Shardings of a whole TrainState: moments lie where their parameters lie, the rest is replicated.

    `params` may be abstract; `param_shardings` has its structure.
    """
    everywhere = replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(
        step=everywhere,
        params=param_shardings,
        opt_state=opt_state,
        key=everywhere,
        rejected=everywhere,
        rejected_in_a_row=everywhere,
    )


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int) -> None:
    """Every part of a batch must give each device of the data and fsdp axes the same number of rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * accumulate):
        raise ValueError(
            f"batch_size must be a multiple of mesh.data * mesh.fsdp * accumulate = {mesh.shape['data']} * "
            f"{mesh.shape['fsdp']} * {accumulate}; got {batch_size}"
        )


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads part `index` of `count` equal parts of the rows of every batch.

    Processes that differ only in their tensor coordinates hold the same rows and get the same index.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])  # [row shards, tensor]
    shards = len(rows)
    mine = [i for i in range(shards) if any(d.process_index == jax.process_index() for d in rows[i])]
    first, count = mine[0], len(mine)
    if mine != list(range(first, first + count)) or shards % count or first % count:
        raise ValueError(
            f"process {jax.process_index()} would hold row shards {mine} of {shards}; choose mesh sizes so "
            "that the devices of a process divide the mesh evenly"
        )
    return first // count, shards // count


def global_batch(mesh: Mesh, local: dict[str, np.ndarray], num_parts: int) -> dict[str, jax.Array]:
    """Arrays over the mesh from this process's rows, part of `num_parts` equal parts (see `data_shard`)."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * num_parts, *x.shape[1:]))
        for name, x in local.items()
    }
