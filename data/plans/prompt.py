"""The prompt for a plan, and parsing of the reply into steps."""

import json
import re
from typing import Any

from ..steps import number_steps

INSTRUCTIONS = """\
You get a math problem and the numbered steps of its solution. Write the plan that a person could have made before \
solving it: for each step of the solution one step that says what it finds, and by which operation on what.

- Write exactly one plan step for each step of the solution, in the same order, in one short sentence.
- Never write a number that the solution computes, nor the final answer. Numbers of the problem may be written.
- Write [1] for what step 1 of the plan finds, [2] for what step 2 finds, and so on.
- Write in the language of the problem, do not repeat the problem, and write nothing but the plan.

Reply with a JSON object: {"steps": ["first step", "second step", ...]}"""

EXAMPLE_QUESTION = (
    "A baker fills 6 trays with 14 rolls each. He sells two thirds of the rolls before noon and gives 9 to a school. "
    "How many rolls are left?"
)
EXAMPLE_SOLUTION = (
    "There are 6*14=84 rolls.",
    "Before noon he sells 84*2/3=56 rolls.",
    "So 84-56-9=19 rolls are left.",
)
EXAMPLE_PLAN = (
    "Find all rolls by multiplying the trays by the rolls on each",
    "Find the rolls sold before noon by taking two thirds of [1]",
    "Find the rolls that are left by subtracting [2] and the 9 rolls for the school from [1]",
)

NUMBERING = re.compile(r"^(?:step\s*)?[0-9]+\s*[.):]\s+", re.IGNORECASE)


def plan_messages(question: str, execution_steps: list[str]) -> list[dict[str, str]]:
    """Return the messages of the prompt, in the format of chat templates."""
    return [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": _ask(EXAMPLE_QUESTION, EXAMPLE_SOLUTION)},
        {"role": "assistant", "content": json.dumps({"steps": EXAMPLE_PLAN})},
        {"role": "user", "content": _ask(question, execution_steps)},
    ]


def plan_schema(num_steps: int) -> dict[str, Any]:
    """Return the JSON schema of a reply with `num_steps` steps."""
    steps = {"type": "array", "items": {"type": "string"}, "minItems": num_steps, "maxItems": num_steps}
    return {"type": "object", "properties": {"steps": steps}, "required": ["steps"], "additionalProperties": False}


def parse_reply(reply: str) -> list[str] | None:
    """Parse the steps of a reply, one line each, without their numbers.

    The steps are the strings `steps` of the JSON object in the reply. A reply without such an object, from a server
    without support for schemas, may instead have lines numbered 1, 2, ..., optionally after one line that ends with
    a colon. Return None if the reply has neither.
    """
    steps = _read_json(reply)
    steps = _read_lines(reply) if steps is None else steps
    return None if steps is None else [NUMBERING.sub("", " ".join(step.split())) for step in steps]


def _ask(question: str, execution_steps: list[str] | tuple[str, ...]) -> str:
    steps = number_steps([" ".join(step.split()) for step in execution_steps])
    return "\n".join(["Problem:", question, "", "Solution:", *steps])


def _read_json(reply: str) -> list[str] | None:
    try:
        value = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])
    except (ValueError, RecursionError):
        return None
    steps = value.get("steps") if isinstance(value, dict) else None
    return steps if isinstance(steps, list) and all(isinstance(step, str) for step in steps) else None


def _read_lines(reply: str) -> list[str] | None:
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    lines = lines[1:] if lines and lines[0].endswith(":") else lines
    numbers = [re.match(r"(?:step\s*)?([0-9]+)\s*[.):]\s", line, re.IGNORECASE) for line in lines]
    is_counted = all(number and int(number[1]) == k for k, number in enumerate(numbers, 1))
    return lines if lines and is_counted else None
