"""Range checks for settings."""


def check_at_least(name: str, value: int | None, low: int) -> None:
    """Raise a ValueError if `value` is given and less than `low`."""
    if value is not None and value < low:
        raise ValueError(f"`{name}` must be at least {low}, but got {value}")
