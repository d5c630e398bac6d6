"""Load on the server: latency and tokens per second at several concurrencies, beside one answer after the other.

`python -m hierbd3lm.benchmarks.serving --model DIR --questions FILE` starts `hierbd3lm serve` on a free port of this
machine, asks it as many questions at a time, and compares each answer with that of `generate`. The cases are measured
in turns. Writes results/serving_load.json and results/serving_load.md.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hierbd3lm.serving.arguments import GenerateArguments
from hierbd3lm.serving.generation import Generation
from hierbd3lm.serving.questions import read_questions

from .measure import RESULTS, describe_machine, make_parser

SECONDS = 120  # most seconds of a request
SERIAL = "generate, one after the other"


class Reply(NamedTuple):
    """An answer and what it cost."""

    plan: str
    execution: str
    num_tokens: int
    seconds: float


@contextmanager
def running_server(model: str, device: str, batch_size: int) -> Iterator[int]:
    """Run a server within the context; yields its port."""
    command = [sys.executable, "-m", "hierbd3lm.serving.serve", model, "--port", "0", "--device", device]
    command += ["--batch_size", str(batch_size)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if port := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            yield int(port[1])
        finally:
            process.kill()


def ask(port: int, question: str) -> Reply:
    """Ask the server one question, on a connection of its own."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    body = json.dumps({"messages": [{"role": "user", "content": question}]})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content}")
    message, num_tokens = content["choices"][0]["message"], content["usage"]["completion_tokens"]
    return Reply(message["reasoning_content"], message["content"], num_tokens, time.perf_counter() - start)


def answer_alone(generation: Generation, question: str) -> Reply:
    """Answer one question in this process."""
    start = time.perf_counter()
    line = generation.answer(question)
    num_tokens = line["num_plan_tokens"] + line["num_execution_tokens"]
    return Reply(line["plan"], line["execution"], num_tokens, time.perf_counter() - start)


def run_case(answer: Callable[[str], Reply], questions: Sequence[str], concurrency: int) -> tuple[list[Reply], float]:
    """Answer all questions, so many at a time; returns the answers and the seconds of all."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(answer, questions))
    return replies, time.perf_counter() - start


def measure(
    model: str, questions: Sequence[str], concurrencies: Sequence[int], repeats: int, device: str
) -> list[dict[str, Any]]:
    """Measure each case `repeats` times, in turns, after one round of warming up; returns the rows of the table."""
    generation = Generation(GenerateArguments(model=model, device=device))
    with running_server(model, device, max(concurrencies)) as port:
        cases = {SERIAL: (lambda question: answer_alone(generation, question), 1)}
        cases |= {
            f"server, {number} at a time": (lambda question: ask(port, question), number) for number in concurrencies
        }
        for answer, concurrency in cases.values():
            run_case(answer, questions[: 2 * concurrency], concurrency)
        runs: dict[str, list[tuple[list[Reply], float]]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (answer, concurrency) in cases.items():
                runs[name].append(run_case(answer, questions, concurrency))
    expected = [reply[:2] for reply in runs[SERIAL][0][0]]
    rows = [summarize(name, case, expected) for name, case in runs.items()]
    return [row | {"over_serial": row["tokens_per_second"] / rows[0]["tokens_per_second"]} for row in rows]


def summarize(name: str, runs: Sequence[tuple[list[Reply], float]], expected: Sequence[tuple]) -> dict[str, Any]:
    """Return one row: the median of tokens per second, percentiles over all requests, and the answers that differ."""
    seconds = sorted(reply.seconds for replies, _ in runs for reply in replies)
    return {
        "case": name,
        "tokens_per_second": statistics.median(sum(r.num_tokens for r in replies) / total for replies, total in runs),
        "p50_ms": 1000 * seconds[len(seconds) // 2],
        "p99_ms": 1000 * seconds[min(int(0.99 * len(seconds)), len(seconds) - 1)],
        "num_requests": len(seconds),
        "num_different": sum(r[:2] != e for replies, _ in runs for r, e in zip(replies, expected, strict=True)),
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| case | tokens/s | / serial | p50, ms | p99, ms | requests | other answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['tokens_per_second']:.0f} | {row['over_serial']:.2f} | {row['p50_ms']:.0f} | "
            f"{row['p99_ms']:.0f} | {row['num_requests']} | {row['num_different']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print the table."""
    parser = make_parser("serving", __doc__)
    parser.add_argument("--model", required=True, help="Folder or id of a checkpoint.")
    parser.add_argument("--questions", required=True, help="File of questions, as in `hierbd3lm generate`.")
    parser.add_argument("--requests", type=int, default=200, help="Questions of each run.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="Questions at a time.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each case.")
    parser.add_argument("--device", default="cpu", help="Device of the model.")
    args = parser.parse_args()
    questions = read_questions(args.questions)
    questions = [questions[number % len(questions)] for number in range(args.requests)]
    rows = measure(args.model, questions, args.concurrency, args.repeats, args.device)
    machine = describe_machine() | {"threads": torch.get_num_threads(), "load average": os.getloadavg()[1]}
    command = f"python -m hierbd3lm.benchmarks.serving {' '.join(sys.argv[1:])}"
    write(command, machine, rows)


def write(command: str, machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write the results, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    content = {"command": command, "machine": machine, "rows": rows}
    (RESULTS / "serving_load.json").write_text(json.dumps(content, indent=2) + "\n")
    note = ", ".join(f"{name} {value}" for name, value in machine.items())
    (RESULTS / "serving_load.md").write_text(f"`{command}`: {note}\n\n{format_rows(rows)}\n")
    print(format_rows(rows))


if __name__ == "__main__":
    main()
