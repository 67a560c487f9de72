"""`python -m train RECIPE [--config file.toml] [--flags]`. Exit codes: 0 done, 1 failed or interrupted, 2 usage."""

import dataclasses
import difflib
import importlib
import logging
import os
import sys
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """One training run that has a name.

    `config` is a frozen dataclass in `module` whose fields are the flags; the module's `main(config)` runs it
    and returns the exit code. The module must import nothing heavy at its top, so that help is quick.
    """

    name: str
    module: str
    config: str
    help: str


RECIPES = (
    Recipe("lm", "train.recipes.lm", "LM", "train or fine-tune an autoregressive language model on text"),
    Recipe("dlm", "train.recipes.dlm", "DLM", "turn an autoregressive language model into a block-diffusion one"),
    Recipe("quickstart", "train.recipes.quickstart", "Quickstart", "the whole chain, small, on a CPU in minutes"),
    Recipe("shipped", "train.recipes.shipped", "Shipped", "train the models that the project ships"),
)


class UsageError(Exception):
    """What the user typed cannot be understood; the message says what and where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    try:
        recipe = _find(args[0])
        config = _parse(recipe, args[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:  # tyro has printed help (0) or what is wrong (2)
        return error.code if isinstance(error.code, int) else 2

    _prepare_environment()
    try:
        return importlib.import_module(recipe.module).main(config)
    except KeyboardInterrupt:
        print("error: stopped at once; the last checkpoint is intact", file=sys.stderr)
        return 1
    except Exception as error:
        expected = (ValueError, NotImplementedError, OSError, RuntimeError, MemoryError)
        if not isinstance(error, expected) or os.environ.get("JAXSTREAM_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 1


def _usage() -> str:
    width = max(len(r.name) for r in RECIPES)
    lines = [f"  {r.name:<{width}}  {r.help}" for r in RECIPES]
    return "\n".join(
        [
            "usage: python -m train RECIPE [--config FILE.toml] [--flags]",
            "",
            "recipes:",
            *lines,
            "",
            "python -m train RECIPE --help lists the flags. The same command continues an interrupted run.",
        ]
    )


def _find(name: str) -> Recipe:
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    names = [r.name for r in RECIPES]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"recipe must be one of {', '.join(names)}; got {name!r}{hint}")


def _parse(recipe: Recipe, args: list[str]) -> Any:
    import tyro

    cls = getattr(importlib.import_module(recipe.module), recipe.config)
    file, flags = _take_config(args)
    from_file = [] if file is None else _file_flags(file, cls)
    try:
        return tyro.cli(cls, args=from_file + flags, prog=f"python -m train {recipe.name}")
    except ValueError as error:  # a dataclass refuses the combination of its fields
        raise UsageError(str(error)) from None


def _take_config(args: list[str]) -> tuple[Path | None, list[str]]:
    """Splits `--config FILE` off the arguments."""
    rest, file = [], None
    words = iter(args)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            value = word[len("--config=") :] if "=" in word else next(words, None)
            if not value:
                raise UsageError("--config needs the name of a TOML file")
            file = Path(value)
        else:
            rest.append(word)
    return file, rest


def _file_flags(file: Path, cls: type) -> list[str]:
    """A TOML file as flags, put before those of the command line, which therefore win."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {file}: {error}") from None
    return list(_flags(table, cls, file, ()))


def _flags(
    table: dict[str, Any], cls: type, file: Path, path: tuple[str, ...], prefix: tuple[str, ...] | None = None
) -> Iterator[str]:
    """Flags of a table; `path` names it in the file, `prefix` in flags, where some tables have none."""
    prefix = path if prefix is None else prefix
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for key, value in table.items():
        name = key.replace("-", "_")
        dotted = ".".join((*path, name))
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}"
            raise UsageError(f"--config {file}: unknown key {dotted!r}{hint}")
        flag = "--" + ".".join((*prefix, name)).replace("_", "-")
        kind = fields[name]
        inner: Any = kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise UsageError(f"--config {file}: {dotted!r} must be a table; got {value!r}")
            flat = any(getattr(m, "name", None) == "" for m in getattr(kind, "__metadata__", ()))
            yield from _flags(value, inner, file, (*path, name), prefix if flat else (*prefix, name))
        elif isinstance(value, dict):
            raise UsageError(f"--config {file}: {dotted!r} must be a value; got a table")
        elif isinstance(value, bool):
            yield flag if value else "--" + ".".join((*prefix, "no-" + name)).replace("_", "-")
        elif isinstance(value, list):
            yield flag
            yield from map(str, value)
        else:
            yield f"{flag}={value}"


def _prepare_environment() -> None:
    """Logging, and XLA's persistent compilation cache unless the user has chosen one. JAX is not imported yet."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jaxstream")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # its errors are raised, and reported by us
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = Path("~/.cache/jaxstream/xla").expanduser()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        logger.info("compiled programs are kept in %s (JAX_COMPILATION_CACHE_DIR)", directory)


if __name__ == "__main__":
    sys.exit(main())
