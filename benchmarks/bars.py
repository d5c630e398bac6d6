"""Plot all benchmark results relative to their limits: `python -m hierbd3lm.benchmarks.bars`.

Reads every JSON file in results/ and writes results/bars.png.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .measure import RESULTS, make_parser

MAX_FACTOR = 30  # of the plot


def draw_bars(folder: Path) -> None:
    """Plot the factor by which each result in a folder is better or worse than its limit, into bars.png."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [row for result in results for row in result.get("bars", ()) if row["limit"] is not None][::-1]
    factors = [margin(row) for row in rows]
    figure = Figure(figsize=(11, 1 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['claim']}: {row['measured']:.3g} ({row['direction']} {row['limit']:.3g})" for row in rows]
    colors = ["tab:green" if row["met"] else "tab:red" for row in rows]
    axes.barh(labels, [factor - 1 for factor in factors], left=1, color=colors)
    axes.set(xscale="log", xlabel="factor of the limit: met (green), missed (red)", ylim=(-0.6, len(rows) - 0.4))
    axes.set_xticks(ticks := [0.2, 0.5, 1, 2, 5, 10, MAX_FACTOR], map(str, ticks))
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(folder / "bars.png", dpi=110)


def margin(row: dict[str, Any]) -> float:
    """Return the factor by which a result is better than its limit, clamped to the range of the plot."""
    better, worse = (row["limit"], row["measured"]) if row["direction"] == "<=" else (row["measured"], row["limit"])
    return max(1 / MAX_FACTOR, min(better / worse, MAX_FACTOR)) if worse > 0 else MAX_FACTOR


if __name__ == "__main__":
    make_parser("bars", __doc__).parse_args()
    draw_bars(RESULTS)
