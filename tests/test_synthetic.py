"""The synthetic problems, checked by a reader and solver that knows nothing of how they are made."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations

import pytest

from hierbd3lm.data.synthetic import problems, wording
from hierbd3lm.data.synthetic.config import SPLITS, SyntheticConfig, min_depth, shapes
from hierbd3lm.data.synthetic.problems import generate_dataset, generate_problem, generate_problems
from hierbd3lm.data.synthetic.quantities import draw_problem
from hierbd3lm.data.synthetic.vocabulary import PHRASINGS
from hierbd3lm.data.synthetic.wording import vocabulary_texts

CONFIG = SyntheticConfig()
CONFIGS = {
    "default": CONFIG,
    "small numbers": SyntheticConfig(num_steps=(2, 5), max_value=10, num_distractors=(1, 3), seed=1),
    "chains": SyntheticConfig(num_steps=(4, 4), depth=4, num_names=7, num_distractors=(0, 1), seed=2),
    "wide": SyntheticConfig(num_steps=(8, 8), depth=2, num_names=40, num_things=16, seed=3),
    "wide and deep": SyntheticConfig(num_steps=(12, 16), depth=4, max_value=1000, num_names=40, seed=4),
}
# How GSM8K's answers are read.
ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")

NAME = r"([A-Z][a-z]+)"
NAMES = r"([A-Z][a-z]+(?:, [A-Z][a-z]+)*(?: and [A-Z][a-z]+)?)"
GIVEN = [re.compile(rf"{NAME} (?:has|owns|keeps) (\d+) [a-z]+")]
SUMS = [
    re.compile(rf"{NAME} (?:has|owns) as many [a-z]+ as {NAMES} (?:together|combined)"),
    re.compile(rf"(?P<others>{NAMES}) together have as many [a-z]+ as (?P<name>{NAME})"),
]
COMPARISONS = [
    re.compile(r"(?P<a>[A-Z][a-z]+) (?:has|owns) (?P<how>.+) than (?P<b>[A-Z][a-z]+)"),
    re.compile(r"(?P<a>[A-Z][a-z]+) (?:has|owns) (?P<how>.+ as many [a-z]+) as (?P<b>[A-Z][a-z]+)"),
    re.compile(r"Compared to (?P<b>[A-Z][a-z]+), (?P<a>[A-Z][a-z]+) has (?P<how>.+)"),
]
ASKS = [
    re.compile(rf"How many [a-z]+ does {NAME} (?:have|own)"),
    re.compile(rf"What is the number of [a-z]+ that {NAME} has"),
]
TOTALS = [
    re.compile(rf"How many [a-z]+ do {NAMES} (?:have|own) together"),
    re.compile(rf"What is the total number of [a-z]+ that {NAMES} have"),
]


def split_names(text):
    return re.findall(r"[A-Z][a-z]+", text)


def read_comparison(how):
    """("*", 3) for "3 times as many apples", and so on."""
    if match := re.fullmatch(r"(\d+) (more|fewer) ([a-z]+)", how):
        assert (match[1] == "1") != match[3].endswith("s"), how
        return {"more": "+", "fewer": "-"}[match[2]], int(match[1])
    if match := re.fullmatch(r"(?:twice|(\d+) times) as many [a-z]+s", how):
        return "*", int(match[1] or 2)
    raise AssertionError(how)


def read_sentence(sentence):
    """A fact as (name, symbol, names it refers to, number)."""
    for pattern in GIVEN:
        if match := pattern.fullmatch(sentence):
            return match[1], "given", (), int(match[2])
    if match := SUMS[0].fullmatch(sentence):
        return match[1], "sum", tuple(split_names(match[2])), None
    if match := SUMS[1].fullmatch(sentence):
        return match["name"], "sum", tuple(split_names(match["others"])), None
    for pattern in COMPARISONS:
        if match := pattern.fullmatch(sentence):
            return match["a"], read_comparison(match["how"])[0], (match["b"],), read_comparison(match["how"])[1]
    raise AssertionError(f"no phrasing reads {sentence!r}")


def read_question(question):
    """All facts by name, and the asked name ("total" for a sum that only the last sentence mentions)."""
    assert question.endswith("?") and question.count("?") == 1
    *told, asking = question[:-1].split(". ")
    facts = {}
    for sentence in told:
        name, *fact = read_sentence(sentence)
        assert name not in facts, "one person has one count"
        facts[name] = tuple(fact)
    for pattern in ASKS:
        if match := pattern.fullmatch(asking):
            return facts, match[1]
    for pattern in TOTALS:
        if match := pattern.fullmatch(asking):
            return facts | {"total": ("sum", tuple(split_names(match[1])), None)}, "total"
    raise AssertionError(f"no phrasing asks {asking!r}")


def solve(facts):
    """Every count, by substituting what is known until nothing is left."""
    values = {}
    while len(values) < len(facts):
        solved = len(values)
        for name, (symbol, others, number) in facts.items():
            if name not in values and all(other in values for other in others):
                base = sum(values[other] for other in others)
                values[name] = {
                    "given": lambda base, n: n,
                    "sum": lambda base, n: base,
                    "+": lambda base, n: base + n,
                    "-": lambda base, n: base - n,
                    "*": lambda base, n: base * n,
                }[symbol](base, number)
        assert len(values) > solved, "the facts refer to each other in a circle, or to nobody"
    return values


def chain(facts, name):
    """Operations on the longest chain that ends in `name`."""
    symbol, others, _ = facts[name]
    return 0 if symbol == "given" else 1 + max(chain(facts, other) for other in others)


def needed(facts, name):
    return {name}.union(*(needed(facts, other) for other in facts[name][1]))


def read_skeleton(facts, name):
    """The expression after `name`, written out to the given numbers, sums in any order."""
    symbol, others, number = facts[name]
    return f"({symbol} {number} {sorted(read_skeleton(facts, other) for other in others)})"


@cache
def rows_of(name, split="train", num_examples=300):
    return tuple(generate_problems(split, num_examples, CONFIGS[name]))


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def rows(config):
    return rows_of(next(name for name, value in CONFIGS.items() if value is config))


def test_question_read_and_solved_independently_gives_the_answer(rows, config):
    for row in rows:
        facts, asked = read_question(row["question"])
        values = solve(facts)
        assert str(values[asked]) == row["answer"]
        assert all(1 <= value <= config.max_value for value in values.values())
        assert all(number is None or 1 <= number <= config.max_value for _, _, number in facts.values())


def test_every_sentence_speaks_of_one_thing(rows):
    for row in rows:
        things = [
            t.removesuffix("s") for t in re.findall(r"(?:\d|more|fewer|many|number of) ([a-z]+)", row["question"])
        ]
        assert len(set(things) - {"more", "fewer", "time"}) == 1


def test_steps_and_depth_are_exact_and_every_step_is_needed(rows, config):
    for row in rows:
        facts, asked = read_question(row["question"])
        operations = {name for name in needed(facts, asked) if facts[name][0] != "given"}
        assert row["num_steps"] == len(operations) == len(row["plan_steps"]) == len(row["execution_steps"])
        assert {step.split(" = ")[0] for step in row["plan_steps"]} == operations
        assert row["depth"] == chain(facts, asked)
        assert config.num_steps[0] <= row["num_steps"] <= config.num_steps[1]
        assert row["depth"] in shapes("train", config)[row["num_steps"]]
        distractors = len(facts) - len(needed(facts, asked))
        assert config.num_distractors[0] <= distractors <= config.num_distractors[1]


def test_no_two_needed_steps_are_the_same_operation(rows):
    for row in rows:
        facts, asked = read_question(row["question"])
        steps = [facts[name] for name in needed(facts, asked) if facts[name][0] != "given"]
        assert len({(symbol, frozenset(others), number) for symbol, others, number in steps}) == len(steps)


def test_dependencies_are_topological_exact_and_give_the_depth(rows):
    for row in rows:
        made = [step.split(" = ")[0] for step in row["plan_steps"]]
        levels = []
        for i, (step, before) in enumerate(zip(row["plan_steps"], row["depends_on"], strict=True)):
            referred = re.findall(r"[A-Za-z]+", step.split(" = ")[1])
            assert before == sorted({made.index(name) for name in referred if name in made})
            assert all(j < i for j in before)
            levels.append(1 + max((levels[j] for j in before), default=0))
        assert max(levels) == levels[-1] == row["depth"]
        assert levels == sorted(levels), "steps are written layer by layer"


def test_plan_states_the_facts_of_the_question_and_no_computed_number(rows):
    for row in rows:
        facts, _ = read_question(row["question"])
        stated = set(re.findall(r"\d+", row["question"].replace("twice", "2")))
        assert row["plan"] == "\n".join(row["plan_steps"])
        assert set(re.findall(r"\d+", row["plan"])) <= stated
        for step in row["plan_steps"]:
            name, right = step.split(" = ")
            symbol, others, number = facts[name]
            expected = " + ".join(others) if symbol == "sum" else f"{others[0]} {symbol} {number}"
            assert right == expected


def test_execution_is_the_plan_with_numbers(rows):
    for row in rows:
        values = solve(read_question(row["question"])[0])
        for plan_step, step in zip(row["plan_steps"], row["execution_steps"], strict=True):
            name, right = plan_step.split(" = ")
            made, expression, value = step.split(" = ")
            assert made == name and value == str(values[name])
            assert expression.split() == [str(values.get(word, word)) for word in right.split()]
            assert re.fullmatch(r"[\d +*-]+", expression) and eval(expression) == int(value)


def test_execution_ends_with_the_answer_in_gsm8k_format(rows):
    for row in rows:
        *steps, last = row["execution"].split("\n")
        assert steps == row["execution_steps"]
        assert ANSWER.findall(row["execution"]) == [row["answer"]] == [ANSWER.fullmatch(last)[1]]
        assert row["answer"] == row["execution_steps"][-1].split(" = ")[-1]


def test_all_phrasings_and_sentence_orders_occur():
    questions = [row["question"] for row in rows_of("default", "train", 2000)]
    for phrasing in sum(PHRASINGS.values(), ()):
        words = re.sub(r"\\{\w+\\}", ".+", re.escape(phrasing))
        assert any(re.search(words, question) for question in questions), phrasing
    first_is_given = Counter(bool(GIVEN[0].fullmatch(question.split(". ")[0])) for question in questions)
    assert min(first_is_given.values()) > 400


def test_steps_and_depths_are_drawn_evenly():
    rows = rows_of("default", "train", 2000)
    steps = Counter(row["num_steps"] for row in rows)
    assert set(steps) == {1, 2, 3} and min(steps.values()) > 550
    depths = Counter(row["depth"] for row in rows if row["num_steps"] == 3)
    assert set(depths) == {2, 3} and min(depths.values()) > 0.4 * steps[3]


@pytest.mark.parametrize(("num_steps", "depth"), [(1, 1), (5, 5), (6, 3), (8, 2), (12, 3), (20, 5), (24, 8)])
def test_steps_and_depth_are_knobs_from_width_1_to_4(num_steps, depth):
    config = SyntheticConfig(num_steps=(num_steps, num_steps), depth=depth, num_names=40)
    for row in generate_problems("train", 30, config):
        facts, asked = read_question(row["question"])
        assert (row["num_steps"], row["depth"]) == (num_steps, depth)
        assert sum(facts[name][0] != "given" for name in needed(facts, asked)) == num_steps
        assert chain(facts, asked) == depth


def test_splits_are_disjoint_by_skeletons_read_from_the_questions():
    read = {}
    for split in SPLITS:
        rows = rows_of("default", split, 600 if split != "train" else 3000)
        read[split] = [(row["num_steps"], read_skeleton(*read_question(row["question"]))) for row in rows]
        if split != "train":
            assert len(set(read[split])) == len(rows), "no two rows of an evaluation split are the same problem"
    for first, second in combinations(SPLITS, 2):
        assert not set(read[first]) & set(read[second]), (first, second)


def test_skeleton_column_tells_apart_what_the_reader_tells_apart():
    skeletons = {}
    for row in rows_of("default", "train", 3000):
        facts, asked = read_question(row["question"])
        skeletons.setdefault(row["skeleton"], set()).add((row["num_steps"], read_skeleton(facts, asked)))
    assert all(len(read) == 1 for read in skeletons.values())
    assert len(set.union(*skeletons.values())) == len(skeletons)


def test_splits_of_the_hash_have_the_same_distribution():
    shares = {}
    for split, num_examples in (("train", 3000), ("test", 600)):
        rows = rows_of("default", split, num_examples)
        shares[split] = Counter((row["num_steps"], row["depth"]) for row in rows)
        shares[split] = {shape: count / num_examples for shape, count in shares[split].items()}
    assert shares["train"] == pytest.approx(shares["test"], abs=0.08)


def test_longer_split_has_one_or_two_more_steps_and_is_no_wider():
    widest = max(row["num_steps"] / row["depth"] for row in rows_of("default", "train", 2000))
    rows = rows_of("default", "ood_longer", 600)
    assert {row["num_steps"] for row in rows} == {4, 5}
    assert all(row["num_steps"] / row["depth"] <= widest for row in rows)


def test_wider_split_is_wider_than_training_up_to_4_and_no_deeper():
    train, rows = rows_of("default", "train", 2000), rows_of("default", "ood_wider", 600)
    widths = {row["num_steps"] / row["depth"] for row in rows}
    assert min(widths) > max(row["num_steps"] / row["depth"] for row in train) and max(widths) == 4
    assert max(row["depth"] for row in rows) <= max(row["depth"] for row in train)


@pytest.mark.parametrize(
    ("fields", "split", "expected"),
    [
        ({"num_steps": (1, 1)}, "train", {1: [1]}),
        ({"num_steps": (1, 3)}, "test", {1: [1], 2: [2], 3: [2, 3]}),
        ({"num_steps": (1, 3), "max_depth": 2}, "train", {1: [1], 2: [2], 3: [2]}),
        ({"num_steps": (1, 3)}, "ood_longer", {4: [3, 4], 5: [4, 5]}),
        ({"num_steps": (1, 3)}, "ood_wider", {4: [2], 5: [2], 6: [2], 7: [2], 8: [2]}),
        ({"num_steps": (3, 4), "depth": 3}, "validation", {3: [3], 4: [3]}),
        ({"num_steps": (4, 4), "depth": 4}, "ood_longer", {5: [5], 6: [6]}),
        ({"num_steps": (2, 2), "num_names": 40}, "ood_wider", {3: [2], 4: [2], 5: [2], 6: [2], 7: [2], 8: [2]}),
    ],
)
def test_shapes_of_the_splits(fields, split, expected):
    assert shapes(split, SyntheticConfig(**fields)) == expected


def test_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again = (list(generate_problems("test", 50, CONFIG)) for _ in range(2))
    assert first == again
    assert first != list(generate_problems("test", 50, SyntheticConfig(seed=1)))
    assert first[:20] == list(generate_problems("test", 20, CONFIG)), "fewer rows are the first ones of more"


def test_rows_of_a_seed_are_the_same_in_every_version():
    former_names = {"depends_on": "dependencies"}
    rows = generate_problems("test", 200, CONFIG)
    rows = json.dumps([{former_names.get(name, name): value for name, value in row.items()} for row in rows])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "4243402c69a6a0db", "published splits would change"


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_command_line_prints_the_same_rows_whatever_the_hash_seed(hash_seed):
    command = [sys.executable, "-m", "hierbd3lm.data.synthetic.problems", "--split", "test", "--num-examples", "20"]
    printed = subprocess.run(
        [*command, "--num-steps", "2", "4", "--seed", "5"],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = list(generate_problems("test", 20, SyntheticConfig(num_steps=(2, 4), seed=5)))
    assert [json.loads(line) for line in printed.splitlines()] == expected


def test_generate_problem_draws_a_row_of_the_training_distribution():
    row = generate_problem(random.Random(0), CONFIG)
    assert row == generate_problem(random.Random(0), CONFIG)
    facts, asked = read_question(row["question"])
    assert str(solve(facts)[asked]) == row["answer"]
    assert list(row) == list(rows_of("default")[0])


@pytest.mark.parametrize("num_steps", [(1, 1), (1, 3)])
def test_dataset_holds_the_rows_with_typed_columns(num_steps):
    config = SyntheticConfig(num_steps=num_steps)
    dataset = generate_dataset("validation", 8, config)
    assert dataset.to_list() == list(generate_problems("validation", 8, config))
    assert dataset.features["depends_on"].feature.feature.dtype == "int64"  # even if no step depends on another
    assert (
        generate_dataset("validation", 3).to_list() == generate_dataset("validation", 3, SyntheticConfig()).to_list()
    )


def test_vocabulary_texts_hold_every_word_of_every_split():
    def words(texts):
        return {word for text in texts for word in re.findall(r" ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\n", text)}

    config = SyntheticConfig(num_names=14, num_things=3)
    rows = [row for split in SPLITS for row in generate_problems(split, 400, config)]
    assert words(row[column] for row in rows for column in ("question", "plan", "execution")) <= words(
        vocabulary_texts(config)
    )


def test_min_depth_leaves_width_4_at_most():
    assert [min_depth(steps) for steps in (1, 2, 8, 9, 12, 13)] == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": (0, 2)}, r"`num_steps\[0\]` must be an integer >= 1, but got 0"),
        ({"num_steps": (3, 2)}, r"`num_steps\[1\]` must be an integer >= 3, but got 2"),
        ({"num_steps": 3}, "`num_steps` must be two integers"),
        ({"num_steps": (1, 2.0)}, r"`num_steps\[1\]` must be an integer"),
        ({"num_steps": (3, 5), "depth": 4}, r"`depth` must be an integer in \[2, 3\], but got 4"),
        ({"num_steps": (9, 9), "depth": 2}, r"`depth` must be an integer in \[3, 9\], but got 2"),
        ({"num_steps": (1, 3), "depth": 2}, "`depth` must be None"),
        ({"num_distractors": (-1, 2)}, r"`num_distractors\[0\]`"),
        ({"max_value": 9}, "`max_value` must be an integer >= 10, but got 9"),
        ({"max_value": True}, "`max_value`"),
        ({"num_names": 5}, r"`num_names` must be an integer in \[6, 40\], but got 5"),
        ({"num_names": 41}, "`num_names`"),
        ({"max_depth": 1}, r"`max_depth` must be an integer >= 2, but got 1"),
        ({"num_steps": (2, 2), "depth": 2, "max_depth": 2}, r"`max_depth` must be None with depth=2, but got 2"),
        ({"num_things": 0}, r"`num_things` must be an integer in \[1, 16\], but got 0"),
        ({"seed": "0"}, "`seed` must be an integer"),
    ],
)
def test_a_bad_configuration_is_refused_with_name_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**fields)


@pytest.mark.parametrize(
    ("split", "num_examples", "fields", "message"),
    [
        ("dev", 1, {}, "`split` must be one of train, validation, test, ood_longer, ood_wider, but got 'dev'"),
        ("train", 0, {}, "`num_examples` must be an integer >= 1, but got 0"),
        ("ood_wider", 1, {"num_steps": (8, 8)}, "`split` 'ood_wider' needs training problems below"),
        ("ood_longer", 1, {"num_names": 7}, "`num_names` must be at least 8 for split 'ood_longer', but got 7"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(split, num_examples, fields, message):
    with pytest.raises(ValueError, match=message):
        list(generate_problems(split, num_examples, SyntheticConfig(**fields)))


def test_few_problems_come_back_in_other_words_and_then_there_are_no_more(monkeypatch):
    monkeypatch.setattr(wording, "PHRASINGS", {kind: phrasings[:1] for kind, phrasings in PHRASINGS.items()})
    config = SyntheticConfig(num_steps=(1, 1), num_distractors=(0, 0), max_value=10, num_names=3, num_things=1)
    rows = []
    with pytest.raises(ValueError, match=r"`num_examples` is more than split 'test' has: after \d+ different"):
        for row in generate_problems("test", 10_000, config):
            rows.append(row)
    skeletons = [row["skeleton"] for row in rows]
    assert len({row["question"] for row in rows}) == len(rows) > len(set(skeletons))
    first_repeat = next(i for i, skeleton in enumerate(skeletons) if skeleton in skeletons[:i])
    assert set(skeletons[:first_repeat]) == set(skeletons), "each problem is told once before any is told again"


@pytest.mark.slow
def test_drawing_many_problems_takes_no_more_draws_for_each(monkeypatch):
    config = SyntheticConfig(max_depth=2, num_distractors=(0, 0), max_value=12, num_names=8, num_things=2)
    num_draws = 0

    def counting(*arguments):
        nonlocal num_draws
        num_draws += 1
        return draw_problem(*arguments)

    monkeypatch.setattr(problems, "draw_problem", counting)
    draws, skeletons = [], []
    for row in generate_problems("test", 2000, config):
        draws.append(num_draws)
        skeletons.append(row["skeleton"])
    assert len({*skeletons}) < 1500  # some shapes have no more than their words left
    assert draws[-1] - draws[999] < 1.5 * 10 * 1000  # a tenth of all problems is in the split


def test_lists_from_a_yaml_file_are_taken_as_pairs():
    assert SyntheticConfig(num_steps=[1, 3]) == SyntheticConfig(num_steps=(1, 3))
