"""Picture of the training mask of fixed lengths: text for a terminal, or an image with matplotlib."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING, FINISHED, OWN_CLEAN, OWN_NOISY = 0, 1, 2, 3  # kinds of attention
# kind -> character, colour, meaning
LEGEND = {
    NOTHING: (".", "#f7f6f3", "no attention"),
    FINISHED: ("#", "#a8c8e4", "finished blocks (clean)"),
    OWN_CLEAN: ("c", "#2b5f94", "own block, clean"),
    OWN_NOISY: ("n", "#e9853b", "own block, noisy"),
}
INK, FAINT_INK, BLOCK_LINE = "#22303c", "#59626b", "#e3e1da"


@dataclass(frozen=True)
class Stream:
    """Rows and columns `start` to `stop` (exclusive) of one segment in one stream."""

    segment: str
    noise: str  # "xt", "x0", or "" for the question, which is always clean
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.segment} {self.noise}".strip()


@dataclass(frozen=True)
class MaskPicture:
    """Content of a picture of the mask.

    Args:
        kinds (`torch.LongTensor` of shape `(total, total)`): kind of attention from each row to each column.
        block_ids (`torch.LongTensor` of shape `(total,)`): block of each token.
        streams: non-empty streams in the order of rows and columns.
        block_size: block size of plan and execution.
    """

    kinds: "torch.Tensor"
    block_ids: "torch.Tensor"
    streams: list[Stream]
    block_size: int


def picture_mask(question_len: int, plan_len: int, execution_len: int, block_size: int) -> MaskPicture:
    """Classify the attention that the training mask allows.

    Raises:
        ValueError: for lengths that the mask does not accept, or if all lengths are 0.
    """
    import torch

    from .. import masking_hierbd3lm as masking

    mask = masking.create_hierarchical_mask(question_len, plan_len, execution_len, block_size)
    if not len(mask):
        raise ValueError("one of `question_len`, `plan_len`, `execution_len` must be at least 1, but all are 0")
    layout = masking.fixed_length_layout(question_len, plan_len, execution_len, block_size)
    block_ids, key_is_clean = layout.block_ids[0], layout.stream_ids[0] == masking.CLEAN
    own_block = torch.where(key_is_clean, OWN_CLEAN, OWN_NOISY)
    kinds = torch.where(block_ids[:, None] == block_ids[None, :], own_block[None, :], FINISHED)
    streams = _streams(question_len, plan_len, execution_len)
    return MaskPicture(kinds.masked_fill(~mask, NOTHING), block_ids, streams, block_size)


def text_diagram(picture: MaskPicture) -> str:
    """Draw the mask as text, with one character per block (`block_size` tokens) of rows and columns."""
    streams, kinds = picture.streams, picture.kinds.tolist()
    cells = [list(range(stream.start, stream.stop, picture.block_size)) for stream in streams]
    gap = " " if sum(map(len, cells)) <= 48 else ""  # to fit a large mask
    margin = max(len(stream.name) for stream in streams) + 1

    def line(name: str, groups: list[str]) -> str:
        return "|".join([name.ljust(margin), *groups]).rstrip()

    def row(name: str, query: int) -> str:
        groups = (gap.join(LEGEND[kinds[query][key]][0] for key in keys) for keys in cells)
        return line(name, [f"{gap}{group}{gap}" for group in groups])

    widths = [len(keys) + len(gap) * (len(keys) + 1) for keys in cells]
    lines = [line("", [stream.name[:width].center(width) for stream, width in zip(streams, widths, strict=True)])]
    for stream, queries in zip(streams, cells, strict=True):
        lines.append("+".join("-" * width for width in (margin, *widths)))
        lines += [row(stream.name if query == stream.start else "", query) for query in queries]
    legend = "   ".join(f"{character} {meaning}" for character, _, meaning in LEGEND.values())
    size = picture.block_size
    scale = f"Rows attend to columns. Each character represents up to {size} x {size} tokens."
    return "\n".join([*lines, "", legend, scale])


def draw_image(picture: MaskPicture, output: str | Path) -> None:
    """Draw the mask into an image file. The format is inferred from the suffix of `output`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for a suffix that matplotlib does not support.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing an image needs matplotlib: run `pip install -e ".[plots]"`') from error
    figure = Figure(figsize=(8.4, 8.5), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    _draw_cells(axes, picture)
    _draw_lines(axes, picture)
    _label_streams(axes, picture)
    _annotate_hidden_regions(axes, picture)
    _draw_legend(figure)
    figure.savefig(output, dpi=150)


def _streams(question_len: int, plan_len: int, execution_len: int) -> list[Stream]:
    streams, start = [], 0
    for segment, noise, length in (
        ("Question", "", question_len),
        ("Plan", "xt", plan_len),
        ("Plan", "x0", plan_len),
        ("Execution", "xt", execution_len),
        ("Execution", "x0", execution_len),
    ):
        streams.append(Stream(segment, noise, start, start + length))
        start += length
    return [stream for stream in streams if stream.stop > stream.start]


def _draw_cells(axes: "Axes", picture: MaskPicture) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([colour for _, colour, _ in LEGEND.values()])
    total = len(picture.kinds)
    axes.imshow(
        picture.kinds.numpy(),
        cmap=colours,
        vmin=0,
        vmax=len(LEGEND) - 1,
        extent=(0, total, total, 0),
        interpolation="none",
    )


def _draw_lines(axes: "Axes", picture: MaskPicture) -> None:
    total = len(picture.kinds)
    stream_edges = [stream.start for stream in picture.streams] + [total]
    block_edges = (picture.block_ids.diff().nonzero()[:, 0] + 1).tolist()
    for edges, colour, width in ((block_edges, BLOCK_LINE, 0.8), (stream_edges, INK, 1.1)):
        axes.hlines(edges, 0, total, colors=colour, linewidths=width, clip_on=False)
        axes.vlines(edges, 0, total, colors=colour, linewidths=width, clip_on=False)


def _label_streams(axes: "Axes", picture: MaskPicture) -> None:
    centres = [(stream.start + stream.stop) / 2 for stream in picture.streams]
    symbols = {"": "", "xt": "\n$x_t$ noisy", "x0": "\n$x_0$ clean"}
    names = [stream.segment + symbols[stream.noise] for stream in picture.streams]
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    axes.tick_params(length=0, labelsize=11, labelcolor=INK)
    axes.set_xlabel("keys: what may be attended to", fontsize=11, color=INK, labelpad=10)
    axes.set_ylabel("queries: what attends", fontsize=11, color=INK, labelpad=10)
    axes.spines[:].set_visible(False)


def _annotate_hidden_regions(axes: "Axes", picture: MaskPicture) -> None:
    """Write the two rules of the hierarchical mask into the empty regions that show them, if they fit."""
    spans = {stream.name: (stream.start, stream.stop) for stream in picture.streams}
    if not {"Plan xt", "Execution xt"} <= spans.keys():
        return
    noisy_plan, plan = spans["Plan xt"], (spans["Plan xt"][0], spans["Plan x0"][1])
    execution = spans["Execution xt"][0], spans["Execution x0"][1]
    _write_in_region(axes, "the plan never sees the execution", rows=plan, columns=execution, rotation=0)
    _write_in_region(axes, "the execution never sees a noisy plan", rows=execution, columns=noisy_plan, rotation=90)


def _write_in_region(axes: "Axes", text: str, rows: tuple[int, int], columns: tuple[int, int], rotation: int) -> None:
    total = axes.get_xlim()[1]
    short, long = sorted((rows[1] - rows[0], columns[1] - columns[0]))
    if short < 0.05 * total or long < 0.45 * total:
        return
    background = {"facecolor": LEGEND[NOTHING][1], "edgecolor": "none", "pad": 4}
    style = {"ha": "center", "va": "center", "fontsize": 11, "style": "italic", "color": FAINT_INK, "bbox": background}
    axes.text(sum(columns) / 2, sum(rows) / 2, text, rotation=rotation, **style)


def _draw_legend(figure: "Figure") -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, edgecolor=INK, linewidth=0.6, label=text) for _, colour, text in LEGEND.values()
    ]
    figure.legend(
        handles=patches[1:] + patches[:1],
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        fontsize=11,
        labelcolor=INK,
        handlelength=1.2,
        handleheight=1.2,
    )
