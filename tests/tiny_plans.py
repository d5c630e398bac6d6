"""Problems, and replies of a server that writes plans for them."""

import json
import re
from pathlib import Path

NUM_PROBLEMS, NUM_SAMPLES = 6, 3
RESULTS = ("plans.jsonl", "rejected.jsonl", "summary.json", "README.md")


def make_problem_row(i):
    boxes, pens, lost = 11 + i, 30 + 2 * i, 4 + i
    everything = boxes * pens
    return {
        "question": f"Tom has {boxes} boxes of {pens} pens each and loses {lost} pens. How many pens does he keep?",
        "execution": f"Tom has {boxes} * {pens} = {everything} pens.\n"
        f"He keeps {everything} - {lost} = {everything - lost} pens.\n#### {everything - lost}",
    }


def write_problems(folder):
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(make_problem_row(i)) + "\n" for i in range(NUM_PROBLEMS)), encoding="utf-8")
    return str(path)


# What the server writes is told by the seed of the request.

KINDS = ("good", "better", "leak", "gibberish", "short")
VERDICTS = {"leak": "leaks_final_answer", "gibberish": "not_steps", "short": "not_aligned"}


def kind_of(seed):
    return KINDS[seed % len(KINDS)]


def write_reply(body):
    results = re.findall(r"= (\d+) pens", body["messages"][-1]["content"])
    return {
        "good": "1. Multiply the boxes by the pens in each\n2. Subtract the lost pens from [1]",
        "better": json.dumps(
            {"steps": ["Find all pens that Tom has", "Find the pens that he keeps, without the lost"]}
        ),
        "leak": json.dumps({"steps": ["Multiply", f"Subtract to get {results[-1]}"]}),
        "gibberish": "\u0133\x1fq!{{7",
        "short": json.dumps({"steps": ["Multiply, then subtract"]}),
    }[kind_of(body["seed"])]


def read_lines(folder, name):
    return [json.loads(line) for line in Path(folder, name).read_text("utf-8").splitlines()]


def seeds_of(bodies):
    """The seeds of all requests, by question."""
    seeds = {}
    for body in bodies:
        question = body["messages"][-1]["content"].split("\n")[1]
        seeds.setdefault(question, set()).add(body["seed"])
    return seeds


def results_of(folder):
    """All that a run leaves; the replies without their order, which is that of their coming."""
    replies = read_lines(folder, "replies.jsonl")
    keys = [(reply["index"], reply["sample"]) for reply in replies]
    assert len(set(keys)) == len(keys), "no reply is there twice"
    replies = sorted(replies, key=lambda reply: (reply["index"], reply["sample"]))
    return replies, {name: Path(folder, name).read_bytes() for name in RESULTS}
