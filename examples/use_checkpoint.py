"""Load a checkpoint, generate, print: `python examples/use_checkpoint.py [--model DIR --question TEXT]`."""

import argparse
from pathlib import Path

from train_on_jsonl import FOLDER, QUESTION, train
from transformers import AutoModel, AutoTokenizer


def answer(model_dir: Path, question: str) -> None:
    """Loads a checkpoint with the code that it carries, and prints what it generates."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    model = AutoModel.from_pretrained(model_dir, trust_remote_code=True)
    output = model.generate(**tokenizer(question, return_tensors="pt"))
    print(f"Plan:\n{tokenizer.decode(output.plan[0], skip_special_tokens=True)}")
    print(f"Execution:\n{tokenizer.decode(output.execution[0], skip_special_tokens=True)}")
    print(f"{output.num_forward_passes.item()} forward passes, {output.tokens_per_forward.item():.2f} tokens in each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="trained first if it is missing")
    parser.add_argument("--question", default=QUESTION.format(red=4, green=3, blue=2))
    args = parser.parse_args()
    if not args.model.exists():
        train(args.model)
    answer(args.model, args.question)
