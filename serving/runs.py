"""Answers to many questions: printed batch by batch, or kept in a folder in which a run resumes.

The folder of a run holds `settings.json`, in `parts/` the answers of each process, appended batch by batch, and at the
end `answers.jsonl`, in the order of the questions, and `summary.json`. A run that is killed at any moment resumes with
the questions that have no answer yet, also with another number of processes.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data import run_folder
from ..evaluation.checkpoints import checksum_of_weights, versions
from ..evaluation.lm_eval.processes import gather
from ..evaluation.prompts import Prompt, encode_prompt, make_batches
from ..evaluation.runner import generate_batch
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import HierBD3LMGenerationConfig, resolve_settings, settings_of
from .answers import check_prompt, read_answer

SETTINGS_FILE, ANSWERS_FILE, SUMMARY_FILE, PARTS = "settings.json", "answers.jsonl", "summary.json", "parts"


class Run:
    """Answers to a list of questions by one model.

    Args:
        settings: generation settings. The seed of each batch is derived from theirs.
        batch_size: questions per batch.
    """

    def __init__(
        self,
        model: HierBD3LMForBlockDiffusion,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        settings: HierBD3LMGenerationConfig,
        batch_size: int,
    ):
        self.model, self.tokenizer, self.questions = model, tokenizer, questions
        self.settings, self.batch_size = settings, batch_size
        self.prompts = [
            encode_prompt(index, question, None, tokenizer, model.config) for index, question in enumerate(questions)
        ]

    def in_order(self) -> Iterator[dict[str, Any]]:
        """Yield the answers in the order of the questions, batch by batch."""
        seeds = random.Random(self.settings.seed)
        for start in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[start : start + self.batch_size]
            batches, seed = make_batches(prompts, self.batch_size), seeds.getrandbits(62)
            lines = self._refused(prompts) + [line for batch in batches for line in self._answer(batch, seed)]
            yield from sorted(lines, key=lambda line: line["index"])

    def in_folder(
        self, folder: Path, described: dict[str, Any], overwrite: bool, rank: int = 0, num_processes: int = 1
    ) -> dict[str, Any] | None:
        """Answer the questions that have no answer in `folder` yet; batches are shared among the processes.

        Args:
            described: where model and questions come from.

        Returns:
            the summary, in the process that finishes last; None in the others.

        Raises:
            ValueError: if the folder holds another run.
        """
        if rank == 0:
            self._start(folder, described, overwrite)
        gather(None, num_processes)  # wait for the folder
        answered = {line["index"] for line in read_parts(folder)}
        seeds = random.Random(self.settings.seed)
        batches = [(batch, seeds.getrandbits(62)) for batch in make_batches(self.prompts, self.batch_size)]
        own = batches[rank::num_processes]
        with (
            run_folder.Log(folder / PARTS / f"{rank:05d}.jsonl") as log,
            tqdm(total=sum(len(batch) for batch, _ in own), desc="Generating", unit="question") as progress,
        ):
            for batch, seed in own:
                # An incomplete batch is answered again as a whole, so that a resumed run draws the same numbers.
                if any(prompt.index not in answered for prompt in batch):
                    log.append(*(line for line in self._answer(batch, seed) if line["index"] not in answered))
                progress.update(len(batch))
        return self._finish(folder, described)

    def _start(self, folder: Path, described: dict[str, Any], overwrite: bool) -> None:
        settings = described | settings_of(self.settings)
        settings |= {"num_questions": len(self.questions), "hash_of_questions": run_folder.hash_of(self.questions)}
        settings |= {"batch_size": self.batch_size, "checksum_of_weights": checksum_of_weights(self.model)}
        results = [ANSWERS_FILE, SUMMARY_FILE, *(str(path.relative_to(folder)) for path in parts_of(folder))]
        run_folder.start_run(folder, settings, SETTINGS_FILE, results, overwrite)
        (folder / PARTS).mkdir(exist_ok=True)

    def _finish(self, folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
        """Gather the parts if every question has its answer; other processes may still be at work."""
        refused = self._refused(self.prompts)
        with FileLock(folder / f".{ANSWERS_FILE}.lock"):
            lines = {line["index"]: line for line in read_parts(folder)} | {line["index"]: line for line in refused}
            if len(lines) < len(self.questions):
                return None
            run_folder.write_lines(folder / ANSWERS_FILE, [lines[index] for index in range(len(lines))])
            answers = [line for line in lines.values() if "refused" not in line]
            summary = summarize(answers, len(refused)) | described | {"settings": settings_of(self.settings)}
            run_folder.write_json(folder / SUMMARY_FILE, summary | {"versions": versions()})
        return summary

    def _answer(self, batch: list[Prompt], seed: int) -> list[dict[str, Any]]:
        start = time.perf_counter()
        written = generate_batch(
            self.model, batch, resolve_settings(self.settings, {"seed": seed}), tokenizer=self.tokenizer
        )
        seconds = round((time.perf_counter() - start) / len(batch), 4)
        return [
            self._line(prompt) | read_answer(prompt, one, self.tokenizer) | {"seconds": seconds}
            for prompt, one in zip(batch, written, strict=True)
        ]

    def _refused(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return the lines of the questions that the model does not accept, with the reason."""
        return [self._line(prompt) | {"refused": self._reason(prompt)} for prompt in prompts if not prompt.is_answered]

    def _line(self, prompt: Prompt) -> dict[str, Any]:
        return {"index": prompt.index, "question": self.questions[prompt.index]}

    def _reason(self, prompt: Prompt) -> str:
        try:
            check_prompt(prompt, self.model.config)
        except ValueError as error:
            return str(error)
        raise RuntimeError(f"question {prompt.index} is accepted")


def parts_of(folder: Path) -> list[Path]:
    """Return the files of answers that processes have written."""
    return sorted((folder / PARTS).glob("*.jsonl"))


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """Return the answers of all processes; a line that is not complete is none."""
    contents = (path.read_bytes() for path in parts_of(folder))
    return [json.loads(line) for content in contents for line in content[: content.rfind(b"\n") + 1].splitlines()]


def summarize(answers: Sequence[dict[str, Any]], num_refused: int) -> dict[str, Any]:
    """Return counts and means over the answers."""
    passes = sum(answer["num_forward_passes"] for answer in answers)
    tokens = sum(answer["num_plan_tokens"] + answer["num_execution_tokens"] for answer in answers)
    return {
        "num_answered": len(answers),
        "num_refused": num_refused,
        "num_finished": sum(answer["finished"] for answer in answers),
        "nfe_per_answer": passes / len(answers) if answers else None,
        "content_tokens_per_forward": tokens / passes if passes else None,
        "seconds": sum(answer["seconds"] for answer in answers),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """Return one line about a run."""
    nfe = "" if summary["nfe_per_answer"] is None else f", {summary['nfe_per_answer']:.3g} forward passes per answer"
    return (
        f"{summary['num_answered']} questions answered ({summary['num_finished']} finished), "
        f"{summary['num_refused']} refused{nfe}"
    )
