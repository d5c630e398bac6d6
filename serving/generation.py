"""What `hierbd3lm generate` does with its arguments."""

import json
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from ..evaluation.checkpoints import load_examples, load_model
from ..evaluation.lm_eval.processes import device_of_process, join_processes
from ..evaluation.prompts import encode_prompt
from ..evaluation.runner import generate_batch
from ..settings_hierbd3lm import resolve_settings
from .answers import check_prompt, check_settings, read_answer
from .arguments import STDIN, GenerateArguments
from .questions import read_questions
from .runs import ANSWERS_FILE, Run, format_summary
from .terminal import chat, format_answer, is_live, print_answer


class Generation:
    """A model and the settings of a command line."""

    def __init__(self, args: GenerateArguments):
        self.args = args
        self.rank, self.num_processes = join_processes()
        device = device_of_process(torch.device(args.device), self.num_processes)
        self.model, self.tokenizer = load_model(args.model, str(device), args.dtype)
        self.settings = resolve_settings(self.model.generation_config, args.generation_settings())
        check_settings(self.model, self.settings, None if args.plan is None else [])

    def answer(self, question: str, streamer: BaseStreamer | None = None) -> dict[str, Any]:
        """Answer one question.

        Raises:
            ValueError: if the model does not accept the question or the plan.
        """
        prompt = encode_prompt(0, question, self.args.plan, self.tokenizer, self.model.config)
        check_prompt(prompt, self.model.config)
        (written,) = generate_batch(self.model, [prompt], self.settings, streamer, self.tokenizer)
        return {"question": question} | read_answer(prompt, written, self.tokenizer)

    def print_answer(self) -> None:
        """Answer `question`."""
        if self.args.json:
            print(json.dumps(self.answer(self.args.question), ensure_ascii=False))
        else:
            print_answer(
                self.args.question, self.answer, self.tokenizer, self.model.config, is_live(self.model.config)
            )

    def chat(self) -> None:
        """Answer the questions that are typed."""
        chat(self.answer, self.tokenizer, self.model.config)

    def print_answers(self) -> None:
        """Answer many questions in their order; a question that is refused is printed with the reason."""
        run = self._run()
        with tqdm(total=len(run.questions), desc="Generating", unit="question") as progress:
            for line in run.in_order():
                progress.update()
                if self.args.json:
                    text = json.dumps(line, ensure_ascii=False)
                else:
                    answer = f"--- Refused\n{line['refused']}" if "refused" in line else format_answer(line)
                    text = f"=== {line['question']}\n{answer}"
                with progress.external_write_mode():
                    print(text, flush=True)

    def write_answers(self) -> None:
        """Answer many questions in `output_dir`, or resume there."""
        if self.settings.seed is None:
            self.settings = resolve_settings(self.settings, {"seed": 0})
        args, folder = self.args, Path(self.args.output_dir)
        described = {name: getattr(args, name) for name in ("model", "questions", "dataset")}
        described["split"] = args.split if args.dataset is not None else None
        summary = self._run().in_folder(folder, described, args.overwrite, self.rank, self.num_processes)
        if summary is not None:
            print(f"{format_summary(summary)} ({folder / ANSWERS_FILE})")

    def _run(self) -> Run:
        if self.args.dataset is not None:
            questions = load_examples(self.args)[1]["question"]
        else:
            questions = read_questions(self.args.questions or STDIN)
        questions = list(questions)[: self.args.limit]
        return Run(self.model, self.tokenizer, questions, self.settings, self.args.batch_size)
