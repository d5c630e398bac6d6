"""Write a plan, edit it, execute it: `python examples/edit_a_plan.py [--model DIR] [--plan TEXT | --step K ...]`."""

import argparse
from pathlib import Path

from train_on_jsonl import FOLDER, QUESTION, train
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from hierbd3lm.evaluation.repair import replan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="trained first if it is missing")
    parser.add_argument("--question", default=QUESTION.format(red=4, green=3, blue=2))
    parser.add_argument("--plan", help="the edited plan; the order of the model's own plan is changed if omitted")
    parser.add_argument("--step", type=int, help="replace this step alone, counted from 0; what is before it stays")
    parser.add_argument("--new_step", help="text of the new step")
    args = parser.parse_args()
    if not args.model.exists():
        train(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True)
    question = tokenizer(args.question, return_tensors="pt")

    # 1. The model's plan and its execution
    output = model.generate(**question)
    show("The model's plan", output, tokenizer)
    # 2. One step of it is replaced: the execution starts again at that step
    if args.step is not None:
        show("One step replaced", replan(model, tokenizer, question, output, args.step, args.new_step), tokenizer)
        return
    # 3. Or all of it: another order of the same terms, and a new execution
    plan = tokenizer.decode(output.plan[0], skip_special_tokens=True)
    edited = tokenizer(args.plan or exchange_terms(plan), add_special_tokens=False, return_tensors="pt").input_ids
    show("The edited plan", model.generate(**question, plan_ids=edited, stage="execution"), tokenizer)


def show(title: str, output: ModelOutput, tokenizer: PreTrainedTokenizerBase) -> None:
    plan, execution = (tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (output.plan, output.execution))
    print(f"--- {title}\n{plan}\n--- Its execution\n{execution}")
    print(f"({int(output.num_forward_passes[0])} forward passes)")


def exchange_terms(plan: str) -> str:
    """Exchanges the first and the last term of a plan of sums: `red + green\\n+ blue` -> `blue + green\\n+ red`."""
    words = plan.split(" ")
    words[0], words[-1] = words[-1], words[0]
    return " ".join(words)


if __name__ == "__main__":
    main()
