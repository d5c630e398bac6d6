"""The server process: loads the model, listens, and on SIGINT or SIGTERM finishes what runs."""

import math

import uvicorn

from ..evaluation.checkpoints import load_model
from ..settings_hierbd3lm import resolve_settings
from .answers import check_settings
from .arguments import ServeArguments
from .limits import TimedProtocol
from .server import make_app

BACKLOG = 2048


def make_server(args: ServeArguments) -> uvicorn.Server:
    """Load the model and return the server that answers with it."""
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    settings = resolve_settings(model.generation_config, args.generation_settings() | {"stage": "full"})
    check_settings(model, settings)
    return uvicorn.Server(
        uvicorn.Config(
            make_app(model, tokenizer, settings, args),
            host=args.host,
            port=args.port,
            http=TimedProtocol,
            ws="none",
            backlog=BACKLOG,
            access_log=False,
            timeout_graceful_shutdown=math.ceil(args.timeout + args.body_timeout),
        )
    )


def serve(args: ServeArguments) -> None:
    """Serve a model. The first signal ends the process when all requests are answered, a second one at once."""
    make_server(args).run()
