import jax
import pytest
from jax.sharding import AbstractMesh

from train.config import HostsConfig, MeshConfig
from train.mesh import check_batch, data_shard, make_mesh


def test_axes_take_the_devices_that_are_left_over():
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    assert data_shard(mesh) == (0, 1)


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=3), "must equal the 8 devices; got 3 \\* 1 \\* 1"),
        (MeshConfig(fsdp=3), "must equal the 8 devices; got the rest \\* 3 \\* 1"),
        (MeshConfig(data=2, fsdp=2, tensor=4), "got 2 \\* 2 \\* 4"),
        (MeshConfig(tensor=16), "got the rest \\* 1 \\* 16"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config, [jax.devices()[0]] * 8)


def test_batches_must_divide_over_the_mesh():
    mesh = AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
    check_batch(mesh, 24, 3)
    with pytest.raises(ValueError, match=r"mesh.data \* mesh.fsdp \* accumulate = 2 \* 2 \* 3; got 20"):
        check_batch(mesh, 20, 3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeshConfig(fsdp=0), "mesh.fsdp must be at least 1; got 0"),
        (lambda: HostsConfig(coordinator="a:1"), "coordinator, num_processes and process_id belong together"),
        (lambda: HostsConfig("a:1", 2, 2), r"process_id must lie in \[0, num_processes=2\); got 2"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
