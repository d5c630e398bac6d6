"""The package's recipes: YAML files in `configs/` with the settings that differ from their defaults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

NULL = "null"  # as in YAML
FOLDER = Path(__file__).parents[1] / "configs"
GRPO_FOLDER = FOLDER / "grpo"


def recipe_names(folder: Path = FOLDER) -> list[str]:
    """Return the names of the package's recipes: those of `hierbd3lm train`, or of another command in its folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(name: str, folder: Path = FOLDER) -> Path:
    """Return a file, or a recipe of the package: `configs/quickstart.yaml`, `quickstart.yaml`, `quickstart`.

    Raises:
        ValueError: if there is neither, or the file is not UTF-8.
    """
    if Path(name).is_file():
        _check_encoding(Path(name))
        return Path(name)
    stem = name.removeprefix(f"{folder.relative_to(FOLDER.parent).as_posix()}/").removesuffix(".yaml")
    names = recipe_names(folder)
    if stem not in names:
        raise ValueError(f"`config` must be a file or one of the recipes {', '.join(names)}, but got {name!r}")
    return folder / f"{stem}.yaml"


def _check_encoding(path: Path) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of {path} must be UTF-8, but got {line!r}") from error


def split_nulls(argv: Sequence[str], types: Sequence[type]) -> tuple[list[str], dict[str, Any]]:
    """Split the settings that are given as `null` from a command line.

    Args:
        types: the dataclasses that declare the settings.

    Returns:
        the other words, and the settings with the value None, which unset those of a recipe.

    Raises:
        ValueError: for a setting that cannot be None.
    """
    optional = {name for kind in types for name, hint in get_type_hints(kind).items() if type(None) in get_args(hint)}
    words, unset = [], {}
    for word in argv:
        name, equals, value = word.partition("=")
        if value == NULL and name.startswith("--"):
            unset[_setting_name(name, optional)] = None
        elif not equals and word == NULL and words and words[-1].startswith("--"):
            unset[_setting_name(words.pop(), optional)] = None
        else:
            words.append(word)
    return words, unset


def _setting_name(flag: str, optional: set[str]) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    if name not in optional:
        raise ValueError(f"`{name}` must have a value or be a setting that can be unset, but got {NULL!r}")
    return name
