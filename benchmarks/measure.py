"""Interleaved timing, and files of results."""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

Measured = tuple[list[dict[str, Any]], dict[str, Any]]  # bars and details

RESULTS = Path(__file__).parent / "results"
CHANGES = ("status", "--porcelain", "-uno", "--", ":/", ":!results")  # git arguments: changes other than results


def interleaved_medians(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each case, after one warm-up run, with the cases run in turns."""
    return {name: statistics.median(values) for name, values in interleaved_seconds(cases, repeats).items()}


def interleaved_seconds(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every run of each case, after one warm-up run, with the cases run in turns."""
    for run in cases.values():
        run()
    return _time_in_turns(cases, repeats, time.perf_counter)


def interleaved_cpu_seconds(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the least CPU seconds of each case, with the cases run in turns.

    With one thread this is the time that a case takes on a quiet machine, as long as the caches are its own.
    """
    return {name: min(values) for name, values in _time_in_turns(cases, repeats, time.process_time).items()}


def _time_in_turns(
    cases: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the time of every run of each case by the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def added_memory(run: Callable[[], Any]) -> int:
    """Return the peak memory of this process in bytes during a call, relative to that before it (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    run()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def is_trained(folder: Path) -> bool:
    """Return whether a run of training is finished: the folder holds the last file that one writes."""
    return (folder / "trainer_state.json").is_file()


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Convert settings to command-line arguments; a list becomes several arguments after its name."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def describe_machine() -> dict[str, Any]:
    """Return machine, versions and commit, for every file of results."""
    return {
        "cpu": _cpu_name(),
        "instructions": _instructions(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git(*CHANGES) else ""),
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _instructions() -> str:
    """Return what the CPU has for products in bfloat16, and the widest vectors that torch uses."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    known = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *known])


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def bar(claim: str, measured: float, limit: float | None, at_most: bool) -> dict[str, Any]:
    """Return a row of the table: a measured value and its limit, if it has one."""
    met = None if limit is None else measured <= limit if at_most else measured >= limit
    return {"claim": claim, "measured": measured, "limit": limit, "direction": "<=" if at_most else ">=", "met": met}


def ratio_bar(
    claim: str, seconds: list[float], other_seconds: list[float], limit: float | None, at_most: bool
) -> dict[str, Any]:
    """Return a row with the ratio of medians of two cases, and the least and greatest ratio of a turn as `spread`."""
    ratios = [one / other for one, other in zip(seconds, other_seconds, strict=True)]
    ratio = statistics.median(seconds) / statistics.median(other_seconds)
    return bar(claim, ratio, limit, at_most) | {"spread": [min(ratios), max(ratios)]}


def measure_parts(script: str, parts: dict[str, Callable[[], Measured]], description: str | None) -> None:
    """Measure the parts named on the command line, or all, on two threads, and write their results."""
    for name in read_parts(script, parts, description):
        write_results(script, name, *parts[name]())


def read_parts(script: str, parts: Iterable[str], description: str | None) -> list[str]:
    """Read the names of parts from the command line, all parts if there are none, and set two threads."""
    parser = make_parser(script, description)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(parts)}; all if omitted.")
    names = parser.parse_args().parts
    for name in names:
        if name not in parts:
            parser.error(f"`part` must be one of {', '.join(parts)}, but got {name!r}")
    torch.set_num_threads(2)
    return names or list(parts)


def trained_folder(path: str) -> str:
    """Return the folder of a trained model, in which results are written; the type of a command-line argument."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, but got {path!r}")
    return path


def make_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark's command line; `description` is the docstring of its module."""
    formatter = argparse.RawDescriptionHelpFormatter
    prog = f"python -m hierbd3lm.benchmarks.{script}"
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter)


def write_results(
    script: str, part: str, bars: list[dict[str, Any]], details: dict[str, Any], text: str | None = None
) -> None:
    """Write results/{script}_{part}.json and .md, and print the table, or `text` in its place.

    With `text` the command is that of this process, else the one that measures the part.
    """
    command = None if text is None else shlex.join(["python", "-m", f"hierbd3lm.benchmarks.{script}", *sys.argv[1:]])
    content = {
        "command": command or _command(script, part),
        "machine": describe_machine(),
        "bars": bars,
        "details": details,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{script}_{part}.json").write_text(json.dumps(content, indent=2) + "\n")
    write_text(script, part, format_table(bars) if text is None else text, command)


def write_text(script: str, part: str, text: str, command: str | None = None) -> None:
    """Write results/{script}_{part}.md, headed by command, machine and commit, and print the text."""
    RESULTS.mkdir(exist_ok=True)
    note = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    (RESULTS / f"{script}_{part}.md").write_text(f"`{command or _command(script, part)}`: {note}\n\n{text}\n")
    print(text)


def _command(script: str, part: str) -> str:
    return f"python -m hierbd3lm.benchmarks.{script} {part}"


def format_table(bars: list[dict[str, Any]]) -> str:
    """Format the bars as a Markdown table."""
    lines = ["| claim | measured | limit | met |", "|---|---|---|---|"]
    for row in bars:
        measured = f"{row['measured']:.3g}"
        if "spread" in row:
            low, high = row["spread"]
            measured += f" ({low:.3g} to {high:.3g})"
        verdict = {None: "", True: "yes", False: "**no**"}[row["met"]]
        limit = "" if row["limit"] is None else f"{row['direction']} {row['limit']:.3g}"
        lines.append(f"| {row['claim']} | {measured} | {limit} | {verdict} |")
    return "\n".join(lines)
