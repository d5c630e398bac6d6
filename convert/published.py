"""The command line of conversion: `hierbd3lm convert --source ID --output_dir DIR`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from transformers import HfArgumentParser


@dataclass
class ConversionArguments:
    """Source and target of a conversion."""

    source: str = field(
        metadata={"help": "Folder or Hub id, such as kuleshov-group/bd3lm-owt-block_size4 or kuleshov-group/mdlm-owt."}
    )
    output_dir: str = field(metadata={"help": "Folder of the converted checkpoint."})
    tokenizer: str = field(default="gpt2", metadata={"help": "Folder or Hub id of the checkpoint's tokenizer."})
    revision: str | None = field(default=None, metadata={"help": "Revision of `source` on the Hub."})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the arguments, convert, save and report."""
    parser = HfArgumentParser(ConversionArguments, prog=prog)
    args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)[0]

    from .dit import convert_checkpoint

    model, published = convert_checkpoint(**asdict(args))
    print(f"{args.output_dir}: {model.num_parameters():,} parameters, blocks of {published.block_size} tokens")
    print(f"not needed and left out: {', '.join(published.buffers) or 'nothing'}")


if __name__ == "__main__":
    main()
