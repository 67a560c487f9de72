"""Set-up of every test run: shape annotations are checked, and no test depends on another's JAX state."""

import gc
import os
from pathlib import Path

import jaxtyping

# Before anything of the project is imported: every annotated function then checks its arguments' shapes.
jaxtyping.install_import_hook(["pallas_kernels", "jaxmodels", "train", "infer"], "beartype.beartype")

# The interpreter of Mosaic kernels blocks a thread of XLA's pool, which has one per core, for each warpgroup that waits
# at a barrier, and one more: on two cores a kernel of three warpgroups may never end.
if (os.cpu_count() or 1) < 8:
    os.environ.setdefault("NPROC", "8")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure() -> None:
    # On a CPU the tests compile far more than they compute: without LLVM's expensive passes, in less than half the
    # time. JAX_DISABLE_MOST_OPTIMIZATIONS=0 brings them back; README and notebook are run with them.
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ and not _has_gpu():
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for processes that tests start
        jax.config.update("jax_disable_most_optimizations", True)


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; none is visible to JAX")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


MOST_MAPPINGS = 20_000
"""Memory mappings of a process after which compiled programs are dropped; Linux allows 65,530 and XLA then crashes."""


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Every program that XLA compiles for a CPU takes mappings of its own: thousands of tests would use them up."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def plain_calls():
    """Shape annotations off: what a user without the checker in the tests gets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
