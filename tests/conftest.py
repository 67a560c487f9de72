"""Set-up of every test run: shape annotations are checked, and no test depends on another's JAX state."""

from jaxtyping import install_import_hook

# Before anything of the project is imported: every annotated function then checks its arguments' shapes.
install_import_hook(["pallas_kernels", "jaxmodels", "train", "infer"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; none is visible to JAX")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
