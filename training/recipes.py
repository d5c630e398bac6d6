"""The package's recipes: YAML files in `configs/` with the settings that differ from their defaults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser

NULL = "null"  # as in YAML
FOLDER = Path(__file__).parents[1] / "configs"
GRPO_FOLDER = FOLDER / "grpo"
USAGE = "%(prog)s [recipe] [--setting value ...]"


def parse_settings(
    argv: Sequence[str], types: Sequence[type], prog: str | None = None, folder: Path = FOLDER
) -> tuple[Any, ...]:
    """Read `[recipe] [--setting value ...]`; a setting on the command line overrides the recipe.

    A recipe is a YAML file, or the name of one in the folder (see [`find_recipe`]). `--setting null` unsets a setting
    of the recipe. `--help_all` prints the help and exits.

    Args:
        types: the dataclasses that declare the settings.

    Returns:
        an instance of each of `types`.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def set_defaults_with_config(self, **config: Any) -> list[str]:
            return super().set_defaults_with_config(**config | unset)

    argv, unset = split_nulls(argv, types)
    parser = Parser(types, prog=prog, usage=USAGE)
    parser.set_defaults(**unset)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    if "--config" in argv[:-1]:
        place = argv.index("--config") + 1
        argv[place] = str(find_recipe(argv[place], folder))
    return parser.parse_args_and_config(argv)


def print_own_help(types: Sequence[type], prog: str | None, note: str, folder: Path = FOLDER) -> None:
    """Print the help of the package's own settings, and exit: those of transformers take seconds to import.

    Args:
        note: printed below the settings, before the names of the folder's recipes.
    """
    epilog = f"{note} Recipes: {', '.join(recipe_names(folder))}."
    parser = HfArgumentParser(types, prog=prog, usage=USAGE, epilog=epilog)
    parser.add_argument("--help_all", action="store_true", help="Show those other settings too.")
    parser.print_help()
    raise SystemExit(0)


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
