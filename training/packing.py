"""Packing: the rows of a training pass, which hold several examples each."""

import heapq

# With attention to this many times `hidden_size` tokens, a token takes half of a layer's time; measured on a CPU in
# bfloat16 by benchmarks/training.py.
ATTENTION_SHARE = 3


def assign_rows(lengths: list[int], hidden_size: int) -> list[int]:
    """Assign examples to rows, so that a pass over the rows takes as little time as possible.

    Few long rows have less padding, many short ones less attention between tokens of different examples, which the
    mask then hides.

    Args:
        lengths: number of tokens of each example.
        hidden_size: of the backbone.

    Returns:
        the row of each example.
    """

    def time(rows: list[int]) -> int:
        totals = row_lengths(lengths, rows)
        return len(totals) * max(totals) * (ATTENTION_SHARE * hidden_size + max(totals))

    return min((spread(lengths, num_rows) for num_rows in range(len(lengths), 0, -1)), key=time)


def spread(lengths: list[int], num_rows: int) -> list[int]:
    """Assign examples to rows of about equal lengths: the longest first, each to the shortest row."""
    rows, heap = [0] * len(lengths), [(0, row) for row in range(num_rows)]
    for example in sorted(range(len(lengths)), key=lambda example: -lengths[example]):
        total, row = heap[0]
        rows[example] = row
        heapq.heapreplace(heap, (total + lengths[example], row))
    return rows


def row_lengths(lengths: list[int], rows: list[int]) -> list[int]:
    """Return the number of tokens of each row."""
    totals = [0] * (max(rows) + 1)
    for length, row in zip(lengths, rows, strict=True):
        totals[row] += length
    return totals
