"""`hierbd3lm generate`: one question, a chat, many questions, and runs that are interrupted or shared."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hierbd3lm import cli
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.serving import runs
from hierbd3lm.serving.arguments import GenerateArguments, place_words
from hierbd3lm.serving.generation import Generation
from hierbd3lm.serving.terminal import LiveAnswer, chat
from hierbd3lm.training.lora import load_tokenizer

from .tiny_evaluation import SHORT

QUESTIONS = ["Ann has 3 apples.", "Ben buys 12 pens and 4 more.", "Cy?", "How many pens does Ben have?", "2 + 3"]
TOO_LONG, SPECIAL = "1" * 200, "a <|plan|> b"
FLAGS = ["--device", "cpu", "--max_plan_len", "8", "--max_execution_len", "8"]


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The answers by `generate` of the model, one by one."""
    model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint).eval()
    tokenizer = load_tokenizer(checkpoint)

    def answer(question, **settings):
        output = model.generate(**tokenizer(question, return_tensors="pt"), **SHORT | settings)
        texts = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in (output.plan, output.execution)]
        return (*texts, int(output.num_forward_passes[0]))

    return answer


def run(*arguments):
    cli.main(["generate", *arguments])


def read_json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def as_tuple(line):
    return line["plan"], line["execution"], line["num_forward_passes"]


def give_stdin(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# One question


def test_a_question_is_answered_as_generate_answers_it(checkpoint, expected, capsys):
    run(checkpoint, QUESTIONS[0], *FLAGS)
    printed = capsys.readouterr()
    plan, execution, passes = expected(QUESTIONS[0])
    assert plan and printed.out == f"--- Plan\n{plan}\n--- Execution\n{execution}\n"
    assert f"({passes} forward passes, " in printed.err
    run("--model", checkpoint, "--question", QUESTIONS[0], *FLAGS, "--json", "--sampler", "first_hitting")
    (line,) = read_json_lines(capsys.readouterr().out)
    assert line["question"] == QUESTIONS[0]
    assert as_tuple(line) == expected(QUESTIONS[0], sampler="first_hitting")


def test_a_given_plan_is_executed(checkpoint, capsys):
    model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint).eval()
    tokenizer = load_tokenizer(checkpoint)
    plan_ids = tokenizer("Ann has", add_special_tokens=False, return_tensors="pt").input_ids
    inputs = tokenizer(QUESTIONS[0], return_tensors="pt")
    output = model.generate(**inputs, plan_ids=plan_ids, stage="execution", max_execution_len=8)
    run(checkpoint, QUESTIONS[0], "--plan", "Ann has", "--json", "--device", "cpu", "--max_execution_len", "8")
    (line,) = read_json_lines(capsys.readouterr().out)
    assert line["plan"] == "Ann has"
    assert line["execution"] == tokenizer.decode(output.execution[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (TOO_LONG, r"`question` must have at most question_len=96 tokens, but got \d+"),
        (SPECIAL, r"must not contain special tokens, but got plan \(\d+\)"),
    ],
)
def test_a_question_that_does_not_fit_is_refused(checkpoint, question, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, question, *FLAGS)


def test_words_before_the_flags_are_model_and_question():
    names = ("model", "question")
    assert place_words(["DIR", "a b", "--json"], names) == ["--model", "DIR", "--question", "a b", "--json"]
    assert place_words(["--model", "DIR"], names) == ["--model", "DIR"]
    with pytest.raises(ValueError, match="`question` must be one argument, but got 'How many'"):
        place_words(["DIR", "How", "many"], names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "a", "dataset": "gsm8k"}, "`dataset` must not be given with `question`"),
        ({"output_dir": "out"}, "`questions` or `dataset` must be given for `output_dir`"),
        ({"questions": "-", "plan": "a"}, "`question` must be given for `plan`"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GenerateArguments(model="m", device="cpu", **fields)


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process without `--output_dir`"):
        GenerateArguments(model="m", questions="-")
    GenerateArguments(model="m", questions="-", output_dir="out")


# On a terminal


def test_a_chat_answers_every_question_and_survives_those_that_do_not_fit(checkpoint, expected, capsys):
    generation = Generation(GenerateArguments(model=checkpoint, device="cpu", **SHORT))
    typed = iter([QUESTIONS[0], "", TOO_LONG, QUESTIONS[1]])

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    chat(generation.answer, generation.tokenizer, generation.model.config, read)
    printed = capsys.readouterr()
    answers = [expected(question) for question in QUESTIONS[:2]]
    assert printed.out == "".join(f"--- Plan\n{plan}\n--- Execution\n{text}\n" for plan, text, _ in answers)
    assert "`question` must have at most question_len=96 tokens" in printed.err


def test_a_live_answer_shades_what_is_masked_and_ends_as_the_answer(checkpoint, expected):
    pytest.importorskip("rich")
    generation = Generation(GenerateArguments(model=checkpoint, device="cpu", **SHORT))
    shown = []
    streamer = LiveAnswer(generation.tokenizer, generation.model.config, shown.append)
    answer = generation.answer(QUESTIONS[0], streamer)
    block = generation.model.config.plan_block_size
    shades = [text.plain.count("░") for text in shown]
    assert max(shades) < block and 0 in shades
    assert {str(span.style) for text in shown for span in text.spans} >= {"bold", "dim", "yellow"}
    plan, execution, _ = expected(QUESTIONS[0])
    assert shown[-1].plain == f"--- Plan\n{plan}\n--- Execution\n{execution}"
    assert as_tuple(answer) == expected(QUESTIONS[0])


# Many questions


@pytest.mark.parametrize("kind", ["txt", "jsonl", "stdin", "stdin of rows"])
def test_questions_are_answered_in_their_order(checkpoint, expected, kind, tmp_path, monkeypatch, capsys):
    questions = [*QUESTIONS[:2], TOO_LONG, *QUESTIONS[2:], SPECIAL]
    lines = [json.dumps({"question": question}) if "s" in kind[-5:] else question for question in questions]
    if kind == "stdin":
        lines = questions
    text = "\n".join([lines[0], "", *lines[1:]]) + "\n"
    source = []
    if kind.startswith("stdin"):
        give_stdin(monkeypatch, text)
    else:
        path = tmp_path / f"questions.{kind}"
        path.write_text(text)
        source = ["--questions", str(path)]
    run(checkpoint, *source, *FLAGS, "--json", "--batch_size", "3")
    answers = read_json_lines(capsys.readouterr().out)
    assert [line["question"] for line in answers] == questions
    for line in answers:
        if line["question"] in (TOO_LONG, SPECIAL):
            assert "must" in line["refused"] and "execution" not in line
        else:
            assert as_tuple(line) == expected(line["question"])


def test_questions_of_a_dataset_are_those_of_the_evaluation(checkpoint, rows, capsys):
    run(checkpoint, "--dataset", "synthetic", "--limit", "10", *FLAGS, "--json")
    assert [line["question"] for line in read_json_lines(capsys.readouterr().out)] == [row["question"] for row in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "`questions` must have at least one question"),
        ('{"question": 3}\n', "line 1 of .* must have the text `question`, but got 3"),
        ('{"question": "a"}\n{"query": "b"}\n', "line 2 of .* must have the text `question`, but got None"),
        ('{"question": "a"}\nb\n', "line 2 of .* must be a JSON object, but got 'b"),
    ],
)
def test_files_without_questions_are_refused(checkpoint, text, message, tmp_path):
    (tmp_path / "questions.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(checkpoint, "--questions", str(tmp_path / "questions.txt"), *FLAGS)


# Runs


@pytest.fixture
def command(checkpoint, tmp_path):
    """A run over 13 questions, two of which are refused, in batches of two at a temperature."""
    questions = [*(f"Ann has {i} apples and {i} pens." for i in range(11)), TOO_LONG, SPECIAL]
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(questions))

    def make(name, *others):
        arguments = [checkpoint, "--questions", str(path), "--output_dir", str(tmp_path / name), *FLAGS]
        return [*arguments, "--batch_size", "2", "--temperature", "1.0", "--sampler", "first_hitting", *others]

    make.questions = questions
    return make


def answers_in(folder):
    lines = read_json_lines(Path(folder, "answers.jsonl").read_text("utf-8"))
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def lines_in_parts(folder):
    return [line["index"] for line in runs.read_parts(Path(folder))]


@pytest.mark.parametrize(("after", "cut"), [(0, 0), (1, 0), (3, 7), (4, 200)])
def test_an_interrupted_run_goes_on_to_the_same_answers(command, tmp_path, monkeypatch, capsys, after, cut):
    run(*command("whole"))
    assert "11 questions answered" in capsys.readouterr().out
    generate, asked = HierBD3LMForBlockDiffusion.generate, []

    def failing(model, **kwargs):
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append(len(kwargs["input_ids"]))
        return generate(model, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HierBD3LMForBlockDiffusion, "generate", failing)
        run(*command("run"))
    part = tmp_path / "run" / "parts" / "00000.jsonl"
    part.write_bytes(part.read_bytes()[: -cut or None])
    num_kept = part.read_bytes().count(b"\n")
    run(*command("run"))
    assert len(lines_in_parts(tmp_path / "run")) == len(set(lines_in_parts(tmp_path / "run"))) == 11
    assert num_kept <= 2 * after
    answers = answers_in(tmp_path / "run")
    assert answers == answers_in(tmp_path / "whole")
    assert [line["question"] for line in answers] == command.questions
    assert [line["index"] for line in answers if "refused" in line] == [11, 12]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["num_answered"], summary["num_refused"]) == (11, 2)


def test_another_run_in_the_folder_is_refused_unless_it_is_overwritten(command, tmp_path):
    run(*command("run"))
    with pytest.raises(ValueError, match=r"top_p: 1\.0 stored, 0\.5 now"):
        run(*command("run", "--top_p", "0.5"))
    before = answers_in(tmp_path / "run")
    run(*command("run", "--top_p", "0.5", "--overwrite"))
    assert answers_in(tmp_path / "run") != before


def test_processes_share_a_run_and_a_later_number_of_them_may_be_another(command, tmp_path, monkeypatch):
    run(*command("whole"))
    monkeypatch.setattr(runs, "gather", lambda value, num_processes: [value])
    generation = Generation(GenerateArguments(model=command("run")[0], questions="-", device="cpu", **SHORT))
    settings = {"temperature": 1.0, "sampler": "first_hitting", "seed": 0}
    settings = generation.settings.__class__(**SHORT, **settings)
    job = runs.Run(generation.model, generation.tokenizer, command.questions, settings, batch_size=2)
    folder = tmp_path / "run"
    assert job.in_folder(folder, {}, False, 0, 3) is None
    assert job.in_folder(folder, {}, False, 2, 3) is None  # the second process was killed
    assert len(lines_in_parts(folder)) == 7
    assert job.in_folder(folder, {}, False, 0, 2) is None  # the six batches are distributed again
    summary = job.in_folder(folder, {}, False, 1, 2)
    assert summary["num_answered"] == 11
    assert sorted(lines_in_parts(folder)) == list(range(11))
    assert answers_in(folder) == answers_in(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on(command, tmp_path):
    run(*command("whole"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "hierbd3lm.serving.generate", *command("run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # each time killed after it has written something more
        before = len(lines_in_parts(tmp_path / "run"))
        with subprocess.Popen(launch, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            deadline = time.monotonic() + 120
            while len(lines_in_parts(tmp_path / "run")) == before and time.monotonic() < deadline:
                if process.poll() is not None:
                    break
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(launch, env=environment, check=True, timeout=300)
    assert sorted(lines_in_parts(tmp_path / "run")) == list(range(11))
    assert answers_in(tmp_path / "run") == answers_in(tmp_path / "whole")


def test_the_seed_of_a_run_is_0_unless_it_is_given(command, tmp_path):
    torch.manual_seed(7)
    run(*command("one"))
    run(*command("other", "--seed", "0"))
    assert answers_in(tmp_path / "one") == answers_in(tmp_path / "other")
