"""The page for the browser: `hierbd3lm demo MODEL`, or `python demo/app.py MODEL`.

On a Hugging Face Space, which gives no arguments, MODEL comes from the environment variable `HIERBD3LM_MODEL`.
"""

import argparse
import os
from collections.abc import Sequence

MODEL_VARIABLE, TWIN_VARIABLE = "HIERBD3LM_MODEL", "HIERBD3LM_AUTOREGRESSIVE"


def parse_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Parse `MODEL [--autoregressive TWIN] [--port N] [--share true]`."""
    parser = argparse.ArgumentParser(
        prog=prog or "python demo/app.py", description="Show in the browser how a checkpoint answers questions."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=os.environ.get(MODEL_VARIABLE),
        help=f"folder or id of a checkpoint or an adapter (default: ${MODEL_VARIABLE})",
    )
    parser.add_argument(
        "--autoregressive",
        metavar="TWIN",
        default=os.environ.get(TWIN_VARIABLE),
        help=f"a checkpoint of algorithm `ar` to answer beside it (default: ${TWIN_VARIABLE})",
    )
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    parser.add_argument(
        "--share",
        type=read_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="open a public link through gradio's servers (default: false)",
    )
    parser.add_argument("--device", help="device such as `cpu` or `cuda:0`; defaults to a GPU if there is one")
    args = parser.parse_args(argv)
    if not args.model:
        parser.error(f"MODEL must be given, here or in ${MODEL_VARIABLE}")
    return args


def read_bool(text: str) -> bool:
    """Read `true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, but got {text!r}")
    return text.lower() == "true"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Load the checkpoints and serve the page until it is interrupted."""
    args = parse_arguments(argv, prog)
    # read by gradio when it is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise SystemExit('error: the page needs gradio: run `pip install -e ".[demo]"`') from error

    from hierbd3lm.demo.answers import Demo, Loaded
    from hierbd3lm.demo.page import build, launch_arguments
    from hierbd3lm.evaluation.arguments import default_device

    device = args.device or default_device()
    try:
        twin = None if args.autoregressive is None else Loaded.from_path(args.autoregressive, device)
        blocks = build(Demo(Loaded.from_path(args.model, device), twin))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    blocks.launch(server_port=args.port, share=args.share, **launch_arguments())


if __name__ == "__main__":
    main()
