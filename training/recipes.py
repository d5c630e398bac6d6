"""The recipes of the package: YAML files in `configs/`, with what differs from the defaults."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"


def recipe_names() -> list[str]:
    """The names that [`find_recipe`] knows."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A file of that name, else the package's own recipe: `configs/quickstart.yaml`, `quickstart.yaml`, `quickstart`.

    Raises:
        ValueError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    names = recipe_names()
    if stem not in names:
        raise ValueError(f"`config` must be a file or one of the recipes {', '.join(names)}, but got {name!r}")
    return FOLDER / f"{stem}.yaml"
