"""The command line of the mask: `hierbd3lm mask [--question-len N ...] [-o FILE]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m hierbd3lm.evaluation.mask",
        description="Draw the training mask of fixed lengths.",
    )
    for name, default in (("question-len", 16), ("plan-len", 16), ("execution-len", 32), ("block-size", 4)):
        what = f"tokens of the {name.removesuffix('-len')}" if name.endswith("-len") else "tokens of a block"
        flags = f"--{name}", f"--{name.replace('-', '_')}"
        parser.add_argument(*flags, type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="image file to write; without it, text is printed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Draw the mask as text, or into an image file."""
    options = parse_arguments(argv, prog)
    from .mask_picture import draw_image, picture_mask, text_diagram

    try:
        picture = picture_mask(options.question_len, options.plan_len, options.execution_len, options.block_size)
        if options.output is not None:
            draw_image(picture, options.output)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(text_diagram(picture) if options.output is None else f"Wrote {options.output}")


if __name__ == "__main__":
    main()
