"""Recipes: one frozen dataclass per training run that has a name. See `train.__main__.LINE`."""
