"""Report on plan dependence: tables and a figure."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, ORACLE, OTHER, EMPTY, CHANGED = "own", "oracle", "other", "empty", "changed"
SOURCES = {
    OWN: "the model's own plan",
    ORACLE: "the reference plan",
    OTHER: "another problem's plan",
    EMPTY: "a plan of no steps",
    CHANGED: "the reference plan, changed",
}
SWAP_OUTCOMES = {
    "swap_follows_step": "carries out the changed step",
    "swap_reaches_answer": "gives the changed plan's answer",
    "swap_ignores_change": "gives the original answer",
}
FIGURE_FILE = "analysis.png"
INK, COLOUR, SWAP_COLOUR = "#22303c", "#2b5f94", "#e9853b"


def format_tables(metrics: dict[str, Any]) -> str:
    """Format two Markdown tables: metrics by source of the plans, and outcomes of changed plans."""
    lines = ["| plan | exact match | agreement | steps carried out | execution NLL |", "|---" * 5 + "|"]
    for source, meaning in SOURCES.items():
        if f"{source}_n" in metrics:
            names = ("exact_match", "agreement", "step_agreement")
            cells = [format_rate(metrics, f"{source}_{name}") for name in names]
            nll = metrics.get(f"{source}_execution_nll")
            lines.append(f"| {meaning} | {' | '.join(cells)} | {'' if nll is None else f'{nll:.4f}'} |")
    if "swap_n" in metrics:
        columns = {"all": metrics, **metrics["swap_kinds"]}
        heads = [f"{kind} ({rates['swap_n']})" for kind, rates in columns.items()]
        lines += ["", f"| what was changed (problems): | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, meaning in SWAP_OUTCOMES.items():
            cells = [format_rate(rates, name) for rates in columns.values()]
            lines.append(f"| the execution {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_rate(metrics: dict[str, Any], name: str) -> str:
    """Format a rate in per cent with its interval; empty if it was not measured."""
    if name not in metrics:
        return ""
    low, high = metrics[f"{name}_interval"]
    return f"{100 * metrics[name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def format_page(result: dict[str, Any]) -> str:
    """Format the page `analysis.md`."""
    notes = [
        f"{result['own_n']} problems of {result['dataset']}, {result['split']}; seed {result['seed']}; 95 % "
        f"intervals in brackets. NLL: of the reference execution, in nats per token; a bound except for `ar`.",
    ]
    if "swap_n" in result:
        notes.append(
            f"Under the changed plan, exact match compares with the answer of that plan. "
            f"{result['num_without_change']} problems have no change with another answer in the range of values. The "
            f"second table covers the problems answered correctly under the reference plan."
        )
    figure = f"![Exact match under each plan, and what a changed plan does]({FIGURE_FILE})"
    return "\n\n".join([f"# {result['model']}: does the plan matter?", *notes, format_tables(result), figure]) + "\n"


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Plot the rates with their intervals into an image file."""
    figure = figure_class()(figsize=(9, 3.4), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[len(SOURCES), len(SWAP_OUTCOMES)], sharey=True)
    exact_match = {source: f"{source}_exact_match" for source in SOURCES if f"{source}_n" in metrics}
    draw_rates(left, metrics, {f"{source} plan": name for source, name in exact_match.items()}, COLOUR)
    left.set_title("exact match (changed plan: with its own answer)", fontsize=11, color=INK)
    outcomes = {name.removeprefix("swap_").replace("_", "\n"): name for name in SWAP_OUTCOMES if name in metrics}
    draw_rates(right, metrics, outcomes, SWAP_COLOUR)
    right.set_title("under the changed plan", fontsize=11, color=INK)
    figure.savefig(path, dpi=150)


def draw_rates(axes: "Axes", metrics: dict[str, Any], names: dict[str, str], colour: str) -> None:
    """Plot a bar for each rate with its interval, in per cent; `names` maps the label of a bar to its rate."""
    values = [100 * metrics[name] for name in names.values()]
    intervals = [[100 * end for end in metrics[f"{name}_interval"]] for name in names.values()]
    # At a rate of 0 or 1 the interval may miss the rate by a rounding, and matplotlib takes no negative lengths.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
    labels = [label.replace(" ", "\n") for label in names]
    axes.bar(labels, values, yerr=[below, above], color=colour, ecolor=INK, capsize=3, width=0.65)
    axes.set_ylim(0, 105)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)


def figure_class() -> type:
    """Return matplotlib's `Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing the analysis needs matplotlib: run `pip install -e ".[plots]"`') from error
    return Figure
