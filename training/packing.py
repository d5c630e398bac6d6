"""Packing: the rows of a training pass, which hold several examples each."""

import heapq

MAX_PADDING = 0.04  # greatest share of padding in a pass


def assign_rows(lengths: list[int]) -> list[int]:
    """Assign examples to as many rows as there can be with little padding.

    Few long rows have less padding, many short ones less attention between tokens of different examples, which the
    mask then hides. A single row has no padding.

    Args:
        lengths: number of tokens of each example.

    Returns:
        the row of each example.
    """
    assignments = (spread(lengths, num_rows) for num_rows in range(len(lengths), 0, -1))
    return next(rows for rows in assignments if padding_share(lengths, rows) <= MAX_PADDING)


def spread(lengths: list[int], num_rows: int) -> list[int]:
    """Assign examples to rows of about equal lengths: the longest first, each to the shortest row."""
    rows, heap = [0] * len(lengths), [(0, row) for row in range(num_rows)]
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        total, row = heap[0]
        rows[example] = row
        heapq.heapreplace(heap, (total + lengths[example], row))
    return rows


def padding_share(lengths: list[int], rows: list[int]) -> float:
    """Return the share of padding in a pass."""
    totals = [0] * (max(rows) + 1)
    for length, row in zip(lengths, rows, strict=True):
        totals[row] += length
    return 1 - sum(totals) / (len(totals) * max(totals))
