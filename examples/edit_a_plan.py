"""Write a plan, edit it, execute the edited plan: `python examples/edit_a_plan.py [--model DIR --plan TEXT]`."""

import argparse
from pathlib import Path

from train_on_jsonl import FOLDER, QUESTION, train
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="trained first if it is missing")
    parser.add_argument("--question", default=QUESTION.format(red=4, green=3, blue=2))
    parser.add_argument("--plan", help="the edited plan; the order of the model's own plan is changed if omitted")
    args = parser.parse_args()
    if not args.model.exists():
        train(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True)
    question = tokenizer(args.question, return_tensors="pt")

    # 1. The model's plan, and nothing more
    plan_ids = model.generate(**question, stage="plan").plan
    plan = tokenizer.decode(plan_ids[0], skip_special_tokens=True)
    # 2. An edited plan: another order of the same terms
    edited = args.plan or exchange_terms(plan)
    edited_ids = tokenizer(edited, add_special_tokens=False, return_tensors="pt").input_ids
    # 3. An execution of each
    for title, text, ids in (("The model's plan", plan, plan_ids), ("The edited plan", edited, edited_ids)):
        output = model.generate(**question, plan_ids=ids, stage="execution")
        print(f"--- {title}\n{text}\n--- Its execution")
        print(tokenizer.decode(output.execution[0], skip_special_tokens=True))


def exchange_terms(plan: str) -> str:
    """Exchanges the first and the last term of a plan of sums: `red + green\\n+ blue` -> `blue + green\\n+ red`."""
    words = plan.split(" ")
    words[0], words[-1] = words[-1], words[0]
    return " ".join(words)


if __name__ == "__main__":
    main()
