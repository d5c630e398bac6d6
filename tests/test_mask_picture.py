"""What is drawn is the mask, as text and as an image."""

import subprocess
import sys

import pytest
import torch

from hierbd3lm.evaluation.mask import main, parse_arguments
from hierbd3lm.evaluation.mask_picture import (
    FINISHED,
    LEGEND,
    NOTHING,
    OWN_CLEAN,
    OWN_NOISY,
    draw_image,
    picture_mask,
    text_diagram,
)
from hierbd3lm.masking_hierbd3lm import create_hierarchical_mask

SMALL = {"question_len": 4, "plan_len": 4, "execution_len": 6, "block_size": 2}
SMALL_ARGUMENTS = ["--question-len", "4", "--plan-len", "4", "--execution-len", "6", "--block-size", "2"]
SMALL_DIAGRAM = """\
             |Quest|Plan |Plan |Executi|Executi
-------------+-----+-----+-----+-------+-------
Question     | c c | . . | . . | . . . | . . .
             | c c | . . | . . | . . . | . . .
-------------+-----+-----+-----+-------+-------
Plan xt      | # # | n . | . . | . . . | . . .
             | # # | . n | # . | . . . | . . .
-------------+-----+-----+-----+-------+-------
Plan x0      | # # | . . | c . | . . . | . . .
             | # # | . . | # c | . . . | . . .
-------------+-----+-----+-----+-------+-------
Execution xt | # # | . . | # # | n . . | . . .
             | # # | . . | # # | . n . | # . .
             | # # | . . | # # | . . n | # # .
-------------+-----+-----+-----+-------+-------
Execution x0 | # # | . . | # # | . . . | c . .
             | # # | . . | # # | . . . | # c .
             | # # | . . | # # | . . . | # # c
"""


def drawn_cells(diagram: str) -> list[str]:
    """The characters of each row of blocks, without labels and lines."""
    rows = diagram.split("\n\n")[0].splitlines()[1:]
    return ["".join(row.split("|")[1:]).replace(" ", "") for row in rows if "|" in row]


@pytest.mark.parametrize("lengths", [(16, 16, 32, 4), (0, 6, 9, 3), (5, 0, 8, 4), (7, 8, 0, 2), (64, 64, 128, 4)])
def test_attention_is_drawn_where_the_mask_allows_it_and_nowhere_else(lengths):
    mask = create_hierarchical_mask(*lengths)
    assert torch.equal(picture_mask(*lengths).kinds != NOTHING, mask)


def test_kinds_of_attention_count_as_in_a_sum_by_hand():
    kinds = picture_mask(**SMALL).kinds
    # 2 x 2 pairs in each own block of plan and execution, 4 x 4 in the question's
    assert (kinds == OWN_NOISY).sum() == (2 + 3) * 4
    assert (kinds == OWN_CLEAN).sum() == 16 + (2 + 3) * 4
    # question for 20 tokens; in both streams: 1 pair of plan blocks, plan for the execution, 3 pairs of its blocks
    assert (kinds == FINISHED).sum() == 20 * 4 + 2 * (1 * 4 + 6 * 4 + 3 * 4)


def test_streams_stand_in_the_published_order_and_empty_ones_are_left_out():
    spans = [(stream.name, stream.start, stream.stop) for stream in picture_mask(**SMALL).streams]
    assert spans == [
        ("Question", 0, 4),
        ("Plan xt", 4, 8),
        ("Plan x0", 8, 12),
        ("Execution xt", 12, 18),
        ("Execution x0", 18, 24),
    ]
    assert [stream.name for stream in picture_mask(0, 0, 4, 2).streams] == ["Execution xt", "Execution x0"]


def test_text_diagram_looks_like_this():
    assert text_diagram(picture_mask(**SMALL)).split("\n\n")[0] + "\n" == SMALL_DIAGRAM


@pytest.mark.parametrize("lengths", [(16, 16, 32, 4), (4, 8, 12, 1), (6, 8, 8, 4), (64, 64, 128, 4)])
def test_text_diagram_has_one_character_for_each_pair_of_blocks(lengths):
    *segments, block_size = lengths
    first_tokens = []  # of every `block_size` tokens; the question's last run may be shorter
    start = 0
    for length in (segments[0], segments[1], segments[1], segments[2], segments[2]):
        first_tokens += range(start, start + length, block_size)
        start += length
    mask = create_hierarchical_mask(*lengths)[first_tokens][:, first_tokens]
    diagram = drawn_cells(text_diagram(picture_mask(*lengths)))
    assert [[cell != "." for cell in row] for row in diagram] == mask.tolist()


def test_text_diagram_of_the_default_lengths_fits_a_terminal(capsys):
    main([])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_command_prints_the_diagram_and_its_legend(capsys):
    main(SMALL_ARGUMENTS)
    printed = capsys.readouterr().out
    assert printed.startswith(SMALL_DIAGRAM)
    assert all(f"{character} {meaning}" in printed for character, _, meaning in LEGEND.values())


def test_image_has_the_colour_of_every_pair_of_tokens(tmp_path):
    """The axes' pixels are found by the dark lines around the streams; cells are read at their centres."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture = picture_mask(16, 16, 32, 4)
    draw_image(picture, tmp_path / "mask.png")
    image = torch.tensor(imread(tmp_path / "mask.png"))[..., :3]
    dark = image.sum(dim=-1) < 0.9
    rows, columns = (torch.nonzero(dark.float().mean(dim=1 - axis) > 0.5)[:, 0] for axis in (0, 1))
    total = len(picture.kinds)
    assert total == 112
    colours = torch.tensor([to_rgb(LEGEND[kind][1]) for kind in range(len(LEGEND))])
    centres = (torch.arange(total) + 0.5) / total
    y = (rows[0] + centres * (rows[-1] - rows[0])).round().long()
    x = (columns[0] + centres * (columns[-1] - columns[0])).round().long()
    pixels = image[y][:, x]  # (total, total, 3)
    nearest = (pixels[:, :, None] - colours).abs().sum(dim=-1).argmin(dim=-1)
    has_attention = picture.kinds != NOTHING  # the rest may have words written on it
    assert torch.equal(nearest[has_attention], picture.kinds[has_attention])
    assert (nearest == picture.kinds).float().mean() > 0.98


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_command_writes_an_image(tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib")
    output = tmp_path / f"mask.{suffix}"
    main([*SMALL_ARGUMENTS, "-o", str(output)])
    assert output.stat().st_size > 1000
    assert capsys.readouterr().out == f"Wrote {output}\n"


def test_image_names_every_stream_on_both_axes_and_every_kind_in_the_legend(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "mask.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_image(picture_mask(**SMALL), output)
    drawing = output.read_text()
    for text, times in (("Question", 2), ("noisy", 4), ("clean", 4), (">Plan<", 4), (">Execution<", 4)):
        assert drawing.count(text) >= times, text
    assert all(meaning in drawing for _, _, meaning in LEGEND.values())


def test_text_needs_no_matplotlib_and_an_image_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main(SMALL_ARGUMENTS)
    assert capsys.readouterr().out.startswith(SMALL_DIAGRAM)
    with pytest.raises(ImportError, match=r'needs matplotlib: run `pip install -e "\.\[plots\]"`'):
        draw_image(picture_mask(**SMALL), tmp_path / "mask.png")
    with pytest.raises(SystemExit, match=r"error: .* needs matplotlib"):
        main(["-o", str(tmp_path / "mask.png")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan-len", "7"], "`block_size` must .* divide plan_len=7"),
        (["--question-len", "0", "--plan-len", "0", "--execution-len", "0"], "must be at least 1, but all are 0"),
        (["-o", "no_such_folder/mask.png"], "no_such_folder"),
        (["-o", "mask.unknown"], "unknown"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(arguments, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(arguments)


def test_importing_the_picture_imports_no_matplotlib():
    code = "import sys, hierbd3lm.evaluation.mask_picture; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_flags_may_be_written_like_the_names_in_messages():
    words = [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in SMALL_ARGUMENTS]
    assert words[0] == "--question_len"
    assert parse_arguments(words) == parse_arguments(SMALL_ARGUMENTS)
