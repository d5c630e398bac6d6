"""What the analysis says of executions and plans is true of generators that are known to follow plans, or not to."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config

from hierbd3lm.backbones_hierbd3lm import special_token_ids
from hierbd3lm.data.arguments import DataArguments
from hierbd3lm.data.gsm8k.answers import wilson_interval
from hierbd3lm.data.splits import load_split
from hierbd3lm.data.synthetic.config import SyntheticConfig
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.evaluation import analyze
from hierbd3lm.evaluation.arguments import AnalysisArguments
from hierbd3lm.evaluation.plan_dependence import SWAPS_FILE, TABLE_FILE, analyse, analyse_checkpoint
from hierbd3lm.evaluation.plan_dependence_report import FIGURE_FILE, SOURCES, SWAP_OUTCOMES, draw, format_tables
from hierbd3lm.evaluation.scoring import rate
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion

from .tiny import make_model
from .tiny_algorithms import ALL

SYNTHETIC = {"num_steps": [1, 2], "max_value": 50}
NUM_PROBLEMS = 24
INTERVALS = {"": 0.5, "_interval": [0.15, 0.85]}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Random models that were "trained" on the synthetic problems."""

    def make(**fields):
        folder = tmp_path_factory.mktemp("checkpoint")
        tokenizer = train_tokenizer(vocabulary_texts(SyntheticConfig()))
        backbone = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        torch.manual_seed(0)
        lengths = {"question_len": 96, "plan_len": 32, "execution_len": 32}
        model = make_model(**special_token_ids(tokenizer), backbone_config=backbone, **(lengths | fields))
        model.generation_config.sampler, model.generation_config.num_steps = "ancestral", 2  # few passes
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        DataArguments(synthetic=SYNTHETIC).save(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def args(checkpoint, tmp_path):
    def make(**fields):
        defaults = {"model": checkpoint, "output_dir": str(tmp_path / "analysis"), "limit": NUM_PROBLEMS}
        return AnalysisArguments(**(defaults | {"batch_size": 5, "num_draws": 2, "device": "cpu"} | fields))

    return make


@pytest.fixture
def rows():
    return load_split(DataArguments(synthetic=SYNTHETIC), "test", NUM_PROBLEMS).to_list()


def follow(row, plan):
    """Carries out a plan with Python's own arithmetic; a quantity that is not known counts as 1."""
    variables = {name: int(n) for name, n in re.findall(r"(\w+) (?:has|owns|keeps) (\d+) \w+\.", row["question"])}
    lines = []
    for line in filter(None, plan.split("\n")):
        name, operation = line.split(" = ")
        numbers = re.sub(r"[A-Za-z]+", lambda match: str(variables.get(match[0], 1)), operation)
        variables[name] = eval(numbers)
        lines.append(f"{name} = {numbers} = {variables[name]}")
    return "\n".join([*lines, f"#### {variables[name] if lines else 0}"])


def ignore(row, plan):
    return row["execution"]


class Writer:
    """Stands in for `generate`: its own plan is the reference's, its execution is `execute(row, plan)`."""

    def __init__(self, checkpoint, rows, execute):
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        self.rows, self.execute = {row["question"]: row for row in rows}, execute
        self.given = []  # a pair of question and plan for each row of each call; no plan where the model writes it

    def __call__(self, model, input_ids, attention_mask, plan_ids=None, generation_config=None, **others):
        assert (plan_ids is not None) == (generation_config.stage == "execution")
        questions = [self.decode(ids) for ids in input_ids]
        given = [None] * len(questions) if plan_ids is None else [self.decode(ids) for ids in plan_ids]
        self.given += zip(questions, given, strict=True)
        rows = [self.rows[question] for question in questions]
        plans = [row["plan"] if plan is None else plan for row, plan in zip(rows, given, strict=True)]
        executions = [self.execute(row, plan) for row, plan in zip(rows, plans, strict=True)]
        return SimpleNamespace(
            plan_followed=None,
            reveal_steps=torch.ones((len(rows), 1), dtype=torch.long),
            plan=self.encode(plans),
            execution=self.encode(executions),
            num_forward_passes=torch.ones(len(rows), dtype=torch.long),
            tokens_per_forward=torch.ones(len(rows)),
            finished=torch.ones(len(rows), dtype=torch.bool),
        )

    def decode(self, ids):
        return self.tokenizer.decode(ids[ids != self.tokenizer.pad_token_id])

    def encode(self, texts):
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        widest = max(map(len, ids))
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (widest - len(row)) for row in ids])


@pytest.fixture
def write(checkpoint, rows, monkeypatch):
    def install(execute):
        writer = Writer(checkpoint, rows, execute)
        monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", lambda model, **kwargs: writer(model, **kwargs))
        return writer

    return install


def read_swaps(run_args):
    return [json.loads(line) for line in Path(run_args.output_dir, SWAPS_FILE).read_text().splitlines()]


def swap_rates(result):
    return tuple(result[name] for name in SWAP_OUTCOMES)


def without_time(value):
    return {name: entry for name, entry in value.items() if name != "seconds"}


# What is measured


@pytest.mark.slow
def test_a_model_that_follows_plans_has_sensitivity_one(args, write):
    write(follow)
    result = analyse_checkpoint(args())
    assert swap_rates(result) == (1, 1, 0)
    assert result["swap_n"] == NUM_PROBLEMS - result["num_without_change"] > NUM_PROBLEMS // 2
    for source in ("own", "oracle", "changed"):
        assert (
            result[f"{source}_exact_match"] == result[f"{source}_agreement"] == result[f"{source}_step_agreement"] == 1
        )
        assert result[f"{source}_verdicts"].keys() == {"followed"}
    assert result["empty_exact_match"] == 0
    assert result["other_exact_match"] < 0.5
    n = result["swap_n"]
    assert result["swap_reaches_answer_interval"] == list(wilson_interval(n, n))
    assert sum(kind["swap_n"] for kind in result["swap_kinds"].values()) == n


@pytest.mark.slow
def test_a_model_that_ignores_plans_has_sensitivity_zero(args, write):
    write(ignore)
    result = analyse_checkpoint(args())
    assert swap_rates(result) == (0, 0, 1)
    assert result["swap_n"] == NUM_PROBLEMS - result["num_without_change"]
    for source in ("own", "oracle", "other", "empty"):
        assert result[f"{source}_exact_match"] == 1
    assert (result["oracle_agreement"], result["changed_agreement"], result["changed_exact_match"]) == (1, 0, 0)


def test_a_model_that_copies_the_changed_step_and_answers_as_before_is_told_apart(args, write, rows):
    def half_hearted(row, plan):
        return follow(row, plan).rpartition(" ")[0] + " " + row["answer"]

    write(half_hearted)
    result = analyse_checkpoint(args())
    assert swap_rates(result) == (1, 0, 1)
    assert (result["changed_step_agreement"], result["changed_agreement"], result["changed_exact_match"]) == (1, 0, 0)


@pytest.mark.slow
def test_sensitivity_is_of_the_problems_that_are_right_under_the_reference_plan(args, write, rows):
    """A third of the problems is followed, a third is ignored, and a third is never right."""
    place = {row["question"]: number for number, row in enumerate(rows)}

    def mixed(row, plan):
        return [follow(row, plan), row["execution"], "#### 0"][place[row["question"]] % 3]

    write(mixed)
    run_args = args()
    result, swaps = analyse_checkpoint(run_args), read_swaps(run_args)
    assert result["own_exact_match"] == result["oracle_exact_match"] == pytest.approx(2 / 3)
    counted = [swap for swap in swaps if swap["index"] % 3 < 2]
    followed = sum(swap["index"] % 3 == 0 for swap in counted)
    assert [swap["is_right_under_reference"] for swap in swaps] == [swap["index"] % 3 < 2 for swap in swaps]
    assert result["swap_n"] == len(counted)
    assert swap_rates(result) == pytest.approx((*[followed / len(counted)] * 2, 1 - followed / len(counted)))
    assert result["changed_exact_match"] == pytest.approx(followed / len(swaps))
    assert result["changed_n"] == len(swaps)


@pytest.mark.slow
def test_without_a_right_answer_there_is_no_sensitivity(args, write):
    write(lambda row, plan: "Mia")
    result = analyse_checkpoint(args())
    assert result["swap_n"] == 0
    assert not [name for name in SWAP_OUTCOMES if name in result]
    assert result["oracle_verdicts"].keys() == {"unreadable", "missing"}
    assert "| the execution gives the original answer |  |" in format_tables(result)


@pytest.mark.slow
def test_every_problem_is_executed_under_the_plans_that_the_sources_name(args, write, rows):
    writer = write(follow)
    run_args = args()
    analyse_checkpoint(run_args)
    plan_of = {row["question"]: row["plan"] for row in rows}
    changed = {swap["question"]: swap["plan"] for swap in read_swaps(run_args)}
    kinds = {
        "own": [question for question, plan in writer.given if plan is None],
        "oracle": [question for question, plan in writer.given if plan == plan_of[question]],
        "empty": [question for question, plan in writer.given if plan == ""],
    }
    for questions in kinds.values():
        assert sorted(questions) == sorted(plan_of)
    left = [
        (question, plan) for question, plan in writer.given if plan not in (None, "", plan_of[question])
    ]  # in the order of the sources: those of `other`, then those of `changed`
    others, changes = left[:NUM_PROBLEMS], left[NUM_PROBLEMS:]
    assert sorted(question for question, _ in others) == sorted(plan_of)
    assert sorted(plan for _, plan in others) == sorted(plan_of.values())
    assert dict(changes) == changed and len(changes) == len(changed)


@pytest.mark.slow
def test_changed_plans_stay_in_the_range_of_the_runs_own_data(args, write):
    write(follow)
    run_args = args()
    analyse_checkpoint(run_args)
    values = [int(n) for swap in read_swaps(run_args) for n in re.findall(r"\d+", swap["execution"])]
    assert max(values) <= SYNTHETIC["max_value"]


# Data of other formats


def test_plans_of_another_format_are_neither_changed_nor_checked(args, tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [{"question": f"{i}", "plan": f"Mia {i}", "execution": f"Tom {i}\n#### {i}"} for i in range(5)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    result = analyse_checkpoint(args(dataset=str(path)))
    assert result["own_n"] == 5
    assert "changed_n" not in result and "swap_n" not in result and "own_agreement" not in result
    for source in ("own", "oracle", "other", "empty"):
        assert f"{source}_exact_match" in result
    assert "plan, changed" not in format_tables(result)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"question": ["1"], "execution": ["#### 1"]}, "`dataset` must have the column plan"),
        ({"question": ["1"], "plan": [""], "execution": ["#### 1"]}, "row 0: `plan` must have at least one step"),
        ({"question": ["1"], "plan": ["Mia"], "execution": ["#### 1"]}, "`plans` must not have the same text"),
    ],
)
def test_data_without_plans_to_compare_are_refused(columns, message, checkpoint, tmp_path):
    model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=message):
        analyse(model, None, datasets.Dataset.from_dict(columns), tmp_path)


# The run


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_and_ablation_is_analysed(name, make_checkpoint, args):
    """Under every order the plan that is given is the plan that comes back, and the likelihood depends on it."""
    run_args = args(model=make_checkpoint(**ALL[name]), limit=6)
    result = analyse_checkpoint(run_args)
    rows = load_split(DataArguments(synthetic=SYNTHETIC), "test", 6).to_list()
    for source in SOURCES:
        lines = [
            json.loads(line)
            for line in Path(run_args.output_dir, source, "predictions.jsonl").read_text().splitlines()
        ]
        assert len(lines) == result[f"{source}_n"]
        assert result[f"{source}_num_too_long"] == 0
        if source == "oracle":
            assert [line["plan"] for line in lines] == [row["plan"] for row in rows]
        if source == "empty":
            assert {line["plan"] for line in lines} == {""}
        if source == "changed":
            assert [line["plan"] for line in lines] == [swap["plan"] for swap in read_swaps(run_args)]
    nlls = [result[f"{source}_execution_nll"] for source in ("oracle", "other", "empty")]
    assert len(set(nlls)) == 3 and all(0 < nll < torch.inf for nll in nlls)
    assert [result[f"{source}_execution_nll_n"] for source in ("oracle", "other", "empty")] == [6, 6, 6]
    assert ("oracle_execution_nll_stderr" in result) is (name != "ar")


@pytest.mark.slow
def test_command_writes_json_table_and_figure(args, monkeypatch, capsys):
    run_args = args(limit=6)
    names = ("model", "output_dir", "limit", "batch_size", "num_draws", "device")
    flags = [word for name in names for word in (f"--{name}", str(getattr(run_args, name)))]
    monkeypatch.setattr(sys, "argv", ["analyze", *flags])
    analyze.main()
    folder = Path(run_args.output_dir)
    result = json.loads((folder / "analysis.json").read_text())
    assert result["model"] == run_args.model and result["seed"] == 0 and result["split"] == "test"
    table = format_tables(result)
    assert table in capsys.readouterr().out
    page = (folder / TABLE_FILE).read_text()
    assert table in page and f"({FIGURE_FILE})" in page
    assert (folder / FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:7]] == [f"| {text}" for text in SOURCES.values()]


def test_tables_say_what_was_measured():
    rates = {f"{name}{suffix}": value for name in SWAP_OUTCOMES for suffix, value in INTERVALS.items()}
    metrics = {f"own_exact_match{suffix}": value for suffix, value in INTERVALS.items()} | {"own_n": 4}
    metrics |= {"oracle_n": 4, "oracle_execution_nll": 0.12345}
    metrics |= rates | {"swap_n": 3, "swap_kinds": {"number": {"swap_n": 2} | rates, "operand": {"swap_n": 1}}}
    assert format_tables(metrics).splitlines() == [
        "| plan | exact match | agreement | steps carried out | execution NLL |",
        "|---|---|---|---|---|",
        "| the model's own plan | 50.0 % [15.0, 85.0] |  |  |  |",
        "| the reference plan |  |  |  | 0.1235 |",
        "",
        "| what was changed (problems): | all (3) | number (2) | operand (1) |",
        "|---|---|---|---|",
        *(
            f"| the execution {text} | 50.0 % [15.0, 85.0] | 50.0 % [15.0, 85.0] |  |"
            for text in SWAP_OUTCOMES.values()
        ),
    ]


@pytest.mark.parametrize("n", range(1, 40))
def test_rates_at_the_ends_of_the_scale_are_drawn(n, tmp_path):
    """Where the interval misses the rate by a rounding, as it does for some numbers of problems."""
    metrics = {"swap_n": n}
    for name, count in {"own_exact_match": n, "empty_exact_match": 0, "swap_ignores_change": n}.items():
        metrics |= rate(name, [True] * count + [False] * (n - count))
    metrics |= {"own_n": n, "empty_n": n}
    draw(metrics, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_result(args, monkeypatch, tmp_path):
    whole = without_time(analyse_checkpoint(args(output_dir=str(tmp_path / "whole"))))
    generate, calls = HierBD3LMForBlockDiffusion.generate, []

    def interrupted(model, **kwargs):
        if len(calls) == 7:  # in the middle of the second source
            raise KeyboardInterrupt
        calls.append(kwargs)
        return generate(model, **kwargs)

    monkeypatch.setattr(HierBD3LMForBlockDiffusion, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyse_checkpoint(args())
    num_batches = -(-NUM_PROBLEMS // 5)
    calls.clear()
    monkeypatch.setattr(
        HierBD3LMForBlockDiffusion, "generate", lambda model, **kwargs: calls.append(1) or generate(model, **kwargs)
    )
    assert without_time(analyse_checkpoint(args())) == whole
    num_batches_changed = -(-whole["changed_n"] // 5)
    assert len(calls) == 4 * num_batches + num_batches_changed - 7
    calls.clear()
    assert without_time(analyse_checkpoint(args())) == whole
    assert not calls


@pytest.mark.slow
def test_another_run_is_not_mixed_in(args):
    analyse_checkpoint(args(limit=4))
    with pytest.raises(ValueError, match="seed: 0 stored, 1 now"):
        analyse_checkpoint(args(limit=4, seed=1))
    assert analyse_checkpoint(args(limit=4, seed=1, overwrite=True))["seed"] == 1


def test_without_matplotlib_nothing_is_started(args, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[plots\]"'):
        analyse_checkpoint(args())
    assert not Path(args().output_dir).exists()
