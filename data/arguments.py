"""How a setting out of its range is refused."""


def check_at_least(name: str, value: int | None, low: int) -> None:
    """Raises a ValueError for a setting that is given and less than `low`."""
    if value is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {value}")
