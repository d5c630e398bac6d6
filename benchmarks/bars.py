"""Draws what the other benchmarks have measured against its limits: `python -m hierbd3lm.benchmarks.bars`.

Reads every JSON under results/, and writes results/bars.png.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .measure import RESULTS

MOST_DRAWN = 30


def draw_bars(folder: Path) -> None:
    """Draws bars.png of every result in a folder: by which factor each limit is kept, or missed."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    rows = [row for result in results for row in result.get("bars", ())][::-1]
    factors = [kept_by(row) for row in rows]
    figure = Figure(figsize=(11, 1 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['claim']}: {row['measured']:.3g} ({row['direction']} {row['limit']:.3g})" for row in rows]
    colors = ["tab:green" if row["met"] else "tab:red" for row in rows]
    axes.barh(labels, [factor - 1 for factor in factors], left=1, color=colors)
    axes.set(xscale="log", xlabel="limit kept by a factor of (green), or missed (red)", ylim=(-0.6, len(rows) - 0.4))
    axes.set_xticks(ticks := [0.2, 0.5, 1, 2, 5, 10, MOST_DRAWN], map(str, ticks))
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(folder / "bars.png", dpi=110)


def kept_by(row: dict[str, Any]) -> float:
    """How many times better than its limit a figure is, within what is drawn; a figure of 0 has no factor."""
    better, worse = (row["limit"], row["measured"]) if row["direction"] == "<=" else (row["measured"], row["limit"])
    return max(1 / MOST_DRAWN, min(better / worse, MOST_DRAWN)) if worse > 0 else MOST_DRAWN


if __name__ == "__main__":
    draw_bars(RESULTS)
