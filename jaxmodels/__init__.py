"""Models: weights, forward passes and every pure function that both loops need."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmodels.pretrained import Pretrained, load_pretrained, save_pretrained

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Loads the models when they are asked for, so that importing the package stays cheap."""
    if name in __all__:
        import jaxmodels.pretrained

        return getattr(jaxmodels.pretrained, name)
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")
