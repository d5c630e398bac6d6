"""The fields of GSM8K, and plans that show no number which only the solution computes."""

import json
import os
import re
from fractions import Fraction

import pytest

from hierbd3lm.data.gsm8k.answers import match_strict
from hierbd3lm.data.gsm8k.numbers import CONSTANTS
from hierbd3lm.data.gsm8k.problems import (
    computed_values,
    load_gsm8k,
    load_gsm8k_rows,
    parse_main,
    parse_socratic,
    steps_from_solution,
)
from hierbd3lm.data.steps import render_steps

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
SOLUTION = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n"
    "#### 72"
)
SOCRATIC = (
    "How many clips did Natalia sell in May? ** Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "How many clips did Natalia sell altogether? ** Natalia sold 48+24 = <<48+24=72>>72 clips altogether.\n"
    "#### 72"
)


def plan_from_solution(question, solution):
    return render_steps(steps_from_solution(question, solution)[0])


needs_gsm8k = pytest.mark.skipif(
    "GSM8K_DIR" not in os.environ, reason="GSM8K_DIR must name a folder with GSM8K's train.jsonl and test.jsonl"
)


# The fields


def test_main_row_gives_question_plan_execution_answer():
    assert parse_main({"question": QUESTION, "answer": SOLUTION}) == {
        "question": QUESTION,
        "plan": "1. Natalia sold clips in May: 48 / 2\n2. Natalia sold clips altogether in April and May: 48 + [1]",
        "execution": "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May.\n#### 72",
        "answer": "72",
        "plan_steps": [
            "1. Natalia sold clips in May: 48 / 2",
            "2. Natalia sold clips altogether in April and May: 48 + [1]",
        ],
        "execution_steps": [
            "Natalia sold 48/2 = 24 clips in May.",
            "Natalia sold 48+24 = 72 clips altogether in April and May.",
        ],
        "depends_on": [[], [0]],
    }


def test_socratic_row_gives_sub_questions_and_steps():
    assert parse_socratic({"question": QUESTION, "answer": SOCRATIC}) == {
        "question": QUESTION,
        "plan": "How many clips did Natalia sell in May?\nHow many clips did Natalia sell altogether?",
        "execution": "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether.\n#### 72",
        "answer": "72",
        "plan_steps": ["How many clips did Natalia sell in May?", "How many clips did Natalia sell altogether?"],
        "execution_steps": ["Natalia sold 48/2 = 24 clips in May.", "Natalia sold 48+24 = 72 clips altogether."],
        "depends_on": None,
    }


@pytest.mark.parametrize(("parse", "text"), [(parse_main, SOLUTION), (parse_socratic, SOCRATIC)])
def test_calculator_marks_are_kept_by_choice(parse, text):
    row = {"question": QUESTION, "answer": text}
    kept, removed = parse(row, keep_calculator=True), parse(row)
    for column in ("execution", "execution_steps"):
        assert re.findall("<<.*?>>", str(kept[column])) == re.findall("<<.*?>>", text)
        assert re.sub("<<.*?>>", "", str(kept[column])) == str(removed[column])


def test_answer_has_no_thousands_commas():
    row = parse_main({"question": "27 * 40?", "answer": "27*40=<<27*40=1080>>1,080\n#### 1,080"})
    assert (row["answer"], row["execution"]) == ("1080", "27*40=1,080\n#### 1080")


def test_socratic_line_without_sub_question_raises():
    with pytest.raises(ValueError, match="sub-question"):
        parse_socratic({"question": QUESTION, "answer": SOLUTION})


def test_row_without_answer_raises():
    with pytest.raises(ValueError, match="must end with '#### '"):
        parse_main({"question": QUESTION, "answer": "Natalia sold 72 clips."})


def write_rows(path, *answers):
    lines = [json.dumps({"question": QUESTION, "answer": answer}) + "\n" for answer in answers]
    path.write_text("".join(lines), encoding="utf-8")


def test_rows_are_read_from_the_folder_in_the_environment(tmp_path, monkeypatch):
    write_rows(tmp_path / "test.jsonl", SOLUTION, SOLUTION)
    write_rows(tmp_path / "test_socratic.jsonl", SOCRATIC)
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path))
    assert load_gsm8k_rows("test").to_list() == [{"question": QUESTION, "answer": SOLUTION}] * 2
    assert load_gsm8k("test", "socratic").to_list() == [parse_socratic({"question": QUESTION, "answer": SOCRATIC})]


def test_folder_argument_goes_before_the_environment(tmp_path, monkeypatch):
    write_rows(tmp_path / "train.jsonl", SOLUTION)
    monkeypatch.setenv("GSM8K_DIR", "/nowhere")
    assert load_gsm8k("train", data_dir=tmp_path, keep_calculator=True)["execution"][0] == SOLUTION


def test_without_a_folder_the_rows_come_from_the_hub(monkeypatch):
    monkeypatch.delenv("GSM8K_DIR", raising=False)
    calls = []
    monkeypatch.setattr(
        "hierbd3lm.data.gsm8k.problems.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    load_gsm8k_rows("test", "socratic")
    assert calls == [(("openai/gsm8k", "socratic"), {"split": "test"})]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_socratic\.jsonl"):
        load_gsm8k("train", "socratic", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("split", "subset", "named"), [("dev", "main", "train, test"), ("test", "all", "main, socratic")]
)
def test_unknown_split_or_subset_raises(split, subset, named):
    with pytest.raises(ValueError, match=f"must be one of {named}, but got"):
        load_gsm8k(split, subset)


# Plans by rule: question, solution, plan

PLANS = {
    "result of an earlier step": (
        "Tom has 5 boxes of 6 pens and loses 4.",
        "Tom has 5*6=<<5*6=30>>30 pens.\nHe keeps 30-4=<<30-4=26>>26 pens.\n#### 26",
        "1. Tom has pens: 5 * 6\n2. He keeps pens: [1] - 4",
    ),
    "annotation without repeated calculation": (
        "8 boys and 8 girls join.",
        "There are <<8+8=16>>16 students.\n#### 16",
        "1. Students: 8 + 8",
    ),
    "units inside the calculation": (
        "5 boxes of 6 pens at $2",
        "He pays 5 boxes * 6 pens/box * $2/pen = $<<5*6*2=60>>60 in all.\n#### 60",
        "1. He pays in all: 5 * 6 * 2",
    ),
    "result before the calculation": (
        "8 boxes of 6 pens",
        "There are 48 pens because 8 times six equals <<8*6=48>>48\n#### 48",
        "1. Pens: 8 * 6",
    ),
    "number of the question in words": (
        "There are three boxes of forty-five pens.",
        "There are 3*45=<<3*45=135>>135 pens.\n#### 135",
        "1. Pens: 3 * 45",
    ),
    "number with a scale": (
        "A film cost $60 million and earned 2 times that.",
        "It earned 2*60,000,000=$<<2*60000000=120000000>>120,000,000\n#### 120000000",
        "1. It earned: 2 * 60000000",
    ),
    "percentage as a decimal": (
        "A coat of $80 is 20% off.",
        "He saves 80*.2=$<<80*.2=16>>16\n#### 16",
        "1. He saves: 80 * 20%",
    ),
    "percentage times a hundredth": (
        "A coat of $80 is 20% off.",
        "He saves 80*20%=$<<80*20*.01=16>>16\n#### 16",
        "1. He saves: 80 * 20%",
    ),
    "rest of a percentage": (
        "A coat of $80 is 20% off.",
        "He pays 80*.8=$<<80*.8=64>>64\n#### 64",
        "1. He pays: 80 * (100% - 20%)",
    ),
    "percentage that a step computed": (
        "40% and 30% of 200 pens are blue.",
        "Together that is 40+30=<<40+30=70>>70%.\nThere are 200*.7=<<200*.7=140>>140 blue pens.\n#### 140",
        "1. Together that: 40 + 30\n2. Blue pens: 200 * [1]%",
    ),
    "cents": (
        "5 pens of 50 cents",
        "He pays 5*.5=$<<5*.5=2.5>>2.5\n#### 2.5",
        "1. He pays: 5 * (50 / 100)",
    ),
    "general knowledge": (
        "He earns $20 a day.",
        "He earns 20*7=$<<20*7=140>>140 a week.\n#### 140",
        "1. He earns a week: 20 * 7",
    ),
    "general knowledge that is the answer": (
        "He sleeps some days a week, 3 more than 4.",
        "He sleeps 4+3=<<4+3=7>>7 days.\nOf 7 days, he wakes on 7-7=<<7-7=0>>0.\n#### 7",
        "1. He sleeps days: 4 + 3\n2. Of [1] days, he wakes on: [1] - [1]",
    ),
    "number computed in the head": (
        "He and 14 friends share 30 pens.",
        "Each gets 30/15=<<30/15=2>>2 pens.\n#### 2",
        "1. Each gets pens: 30 / ?",
    ),
    "number computed in the head, shown in a line": (
        "He and 14 friends share 30 pens.",
        "There are 15 of them.\nEach gets 30/15=<<30/15=2>>2 pens.\n#### 2",
        "1. There are of them\n2. Each gets pens: 30 / [1]",
    ),
    "line that only restates": (
        "Tom has 5 boxes of 6 pens.",
        "Tom has 5 boxes.\nHe has 5*6=<<5*6=30>>30 pens.\n#### 30",
        "1. He has pens: 5 * 6",
    ),
    "calculation without annotation": (
        "Tom has 5 boxes of 6 pens and loses 4.",
        "Tom has 5 x 6 = 30 pens.\nHe keeps 30 – 4 = 26 pens.\n#### 26",
        "1. Tom has pens: 5 * 6\n2. He keeps pens: [1] - 4",
    ),
    "factor in brackets": ("20% of 35 pens are blue.", "Blue: 35(.20)=7\n#### 7", "1. Blue: 35 * 20%"),
    "mark without a calculation": (
        "30 pens, and .9 of them are blue.",
        "There are 27 blue pens because 30 x .9 = <<27=27>>27\n#### 27",
        "1. Blue pens: 30 * 0.9",
    ),
    "equations": (
        "Two numbers sum to 22, and one is 2 more than 3 times the other.",
        "Let x be the smaller.\nx + 3x + 2 = 22\n4x = 20\nx=<<5=5>>5\n#### 5",
        "1. Let x be the smaller\n2. x + 3x + 2 = 22\n3. ?x = ?",
    ),
    "equations with new numbers of general use": (
        "Nine times and 7 times a number make 96.",
        "9x + 7x = 96\n16x = 96\nx = 96/16 = <<96/16=6>>6\n#### 6",
        "1. 9x + 7x = 96\n2. ?x = 96\n3. x: 96 / [2]",
    ),
    "chain of equalities": (
        "There are 60 lines, and he reads four fifths.",
        "He reads 4 * 60 / 5 = 4 * 12 = <<4*60/5=48>>48 lines.\n#### 48",
        "1. He reads lines: 4 * 60 / 5",
    ),
    "fraction in brackets": (
        "66 pens, a third of them blue.",
        "Blue: 66(1/3) = 22 pens\n#### 22",
        "1. Blue: 66 * (1 / 3)",
    ),
    "two annotations in a line": (
        "5 boxes of 6 pens, and 7 more",
        "He has 5*6=<<5*6=30>>30 pens, so in all 30+7=<<30+7=37>>37 pens.\n#### 37",
        "1. He has pens: 5 * 6\n2. In all pens: [1] + 7",
    ),
    "long line": (
        "Tom has 5 boxes of 6 pens and loses 4.",
        "Since Tom had as many as 5 boxes of 6 pens each at first, he has 5*6=<<5*6=30>>30 pens.\n#### 30",
        "1. He has pens: 5 * 6",
    ),
    "brackets and signs": (
        "3 boxes of 8 pens, 2 lost",
        "(3*8)-2=<<(3*8)-2=22>>22\n-2+8=<<-2+8=6>>6\n#### 6",
        "1. (3 * 8) - 2\n2. -2 + 8",
    ),
    "result in words": (
        "5 boxes of 6 pens",
        "The thirty pens are 5*6=<<5*6=30>>30.\n#### 30",
        "1. The pens: 5 * 6",
    ),
    "solution without a calculation": ("2 more than 3?", "It is five.\n#### 5", "1. It is"),
    "solution without a word": ("What is 5?", "5\n#### 5", "1. 5"),
}


@pytest.mark.parametrize(("question", "solution", "plan"), PLANS.values(), ids=PLANS.keys())
def test_plan_is_written(question, solution, plan):
    assert plan_from_solution(question, solution) == plan


def test_question_number_goes_before_a_used_step():
    question = "A box of 6 pens and a box of 3 pens; 2 such pairs of 3 boxes."
    solution = "6/2=<<6/2=3>>3\n3*2=<<3*2=6>>6\n3+3=<<3+3=6>>6\n#### 6"
    assert plan_from_solution(question, solution) == "1. 6 / 2\n2. [1] * 2\n3. 3 + 3"


def test_lines_of_plan_and_solution_that_belong_together_are_one_step():
    question = "Tom has 5 boxes of 6 pens, finds 7, and Ann has half of them."
    lines = [
        "Tom has 5 boxes.",
        "He has 5*6=<<5*6=30>>30 pens, so in all 30+7=<<30+7=37>>37 pens.",
        "",
        "Ann has 37/2=<<37/2=18.5>>18.5 pens.",
        "That is all.",
    ]
    assert steps_from_solution(question, "\n".join([*lines, "#### 18.5"])) == (
        ["1. He has pens: 5 * 6\n2. In all pens: [1] + 7", "3. Ann has pens: [2] / 2"],
        ["\n".join(lines[:2]), "\n".join(lines[2:])],
    )


def test_plan_needs_no_answer_line():
    assert plan_from_solution(QUESTION, SOLUTION.partition("\n####")[0]) == plan_from_solution(QUESTION, SOLUTION)


@pytest.mark.parametrize(
    "line",
    ["12 apples + " * 200, "(" * 2000 + "1", "so " * 1000, "1 " * 2000, "a, " * 2000, "3 / " * 500 + "<<3/3=1>>1"],
)
def test_odd_lines_end_in_reasonable_time(line):
    assert plan_from_solution("12?", line)


# No leak. The reading of numbers here is independent of the rule's.

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
WORD_VALUES = {word: i for i, word in enumerate(f"{WORDS} eighteen nineteen".split(), 1)} | {"zero": 0}
TEN_VALUES = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
STATED_BY = {
    **{"half": 2, "halves": 2, "halved": 2, "twice": 2, "double": 2, "both": 2, "pair": 2, "couple": 2, "third": 3},
    **{"triple": 3, "thrice": 3, "quarter": 4, "fourth": 4, "quadruple": 4, "fifth": 5, "sixth": 6, "eighth": 8},
    **{"tenth": 10, "dozen": 12},
}


def digit_numbers(text):
    found = re.findall(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+", text)
    return {Fraction(number.replace(",", "")) for number in found}


def word_numbers(text):
    """Values of number words, and of `forty-five`, `two hundred`, `one hundred forty-five`, `6 million`."""
    lower = text.lower()
    tokens = re.findall(r"[a-z]+|[\d.,]*\d", lower)
    plain = WORD_VALUES | TEN_VALUES | SCALES
    values = {Fraction(plain[token]) for token in tokens if token in plain}
    for start in range(len(tokens)):
        value, scaled = Fraction(0), Fraction(0)
        for token in tokens[start:]:
            if token in WORD_VALUES or token in TEN_VALUES:
                value += plain[token]
            elif token in SCALES:
                value = (value or 1) * SCALES[token]
                if token != "hundred":
                    scaled, value = scaled + value, Fraction(0)
            elif re.fullmatch(r"[\d.,]*\d", token) and token == tokens[start]:
                value = next(iter(digit_numbers(token)), Fraction(0))
            else:
                break
            values.add(scaled + value)
    return values


def stated_numbers(question):
    stems = {re.sub("(s|d)$", "", word) for word in re.findall("[a-z]+", question.lower())}
    stems |= set(re.findall("[a-z]+", question.lower()))
    implied = {Fraction(STATED_BY[stem]) for stem in stems & STATED_BY.keys()}
    singular = {Fraction(value) for word, value in (WORD_VALUES | TEN_VALUES | SCALES).items() if word in stems}
    return digit_numbers(question) | word_numbers(question) | implied | singular


def plan_numbers(plan):
    """Digits and number words of a plan, but for labels, references and the pronoun `one`."""
    shown = re.sub(r"^\d+\. |\[\d+\]", " ", plan, flags=re.MULTILINE)
    plain = WORD_VALUES | TEN_VALUES
    values = digit_numbers(shown)
    for number in re.findall(r"[a-z]+ty-[a-z]+|[a-z]+", shown.lower()):  # `forty-five` is one number
        words = number.split("-")
        if words != ["one"] and all(word in plain for word in words):
            values.add(Fraction(sum(plain[word] for word in words)))
    return values


def computed_numbers(solution):
    """What a solution finds out: results of annotations, numbers after a `=` and of equations without a result."""
    body, _, answer = solution.partition("####")
    results = re.findall(r"=\s*-?([\d.]+)>>", body)
    results += re.findall(r"=\s*-?[$€£]?([\d,]*\.?\d+)", re.sub("<<.*?>>", "", body))
    results += [line for line in body.split("\n") if re.search("[0-9][a-zA-Z] *=", line) and "<<" not in line]
    return digit_numbers(answer).union(*map(digit_numbers, results))


def leaks(question, solution, plan):
    """Numbers of a plan that are neither stated nor general knowledge which the solution nowhere finds out."""
    unstated = plan_numbers(plan) - stated_numbers(question)
    return {number for number in unstated if number not in CONSTANTS or number in computed_numbers(solution)}


def test_leak_is_found():
    assert leaks(QUESTION, SOLUTION, "1. Natalia sold 24 clips") == {24}
    assert leaks(QUESTION, SOLUTION, "1. Natalia sold twenty clips") == {20}
    assert leaks(QUESTION, SOLUTION, "1. 48 * 7 * 0.5 + [24]") == set()
    assert leaks(QUESTION, SOLUTION, "1. 48 * 72") == {72}
    assert leaks("He sleeps.", "<<3+4=7>>7\n#### 7", "1. 7 days") == {7}
    assert leaks("He sleeps.", "4x = 60\nx=<<15=15>>15\n#### 15", "1. Of 60 minutes") == {60}
    assert leaks("He sleeps.", "7x + 9x = 80\n16x = 80\n#### 5", "1. 16x = ?") == {16}


@pytest.mark.parametrize(("question", "solution", "plan"), PLANS.values(), ids=PLANS.keys())
def test_every_result_and_the_answer_are_among_the_computed_numbers(question, solution, plan):
    results = {Fraction(result) for result in re.findall(r"=\s*-?([\d.]+)>>", solution)}
    answer = digit_numbers(solution.partition("####")[2])
    assert answer and computed_values(solution) >= results | answer


@pytest.mark.parametrize(("question", "solution", "plan"), PLANS.values(), ids=PLANS.keys())
def test_written_plans_leak_nothing(question, solution, plan):
    assert leaks(question, solution, plan) == set()


@pytest.fixture(scope="module", params=[pytest.param("train", marks=pytest.mark.slow), "test"])
def gsm8k(request):
    """(row, parsed row) of a whole split of `main`."""
    return [(row, parse_main(row)) for row in load_gsm8k_rows(request.param)]


@needs_gsm8k
def test_every_plan_of_gsm8k_is_value_free(gsm8k):
    leaky = [parsed for row, parsed in gsm8k if leaks(row["question"], row["answer"], parsed["plan"])]
    assert leaky == []


@needs_gsm8k
def test_every_plan_of_gsm8k_is_numbered_text_with_references_backwards(gsm8k):
    for _, parsed in gsm8k:
        for number, line in enumerate(parsed["plan"].split("\n"), 1):
            assert re.fullmatch(rf"{number}\. \S.*", line), parsed
            assert all(1 <= int(step) < number for step in re.findall(r"\[(\d+)\]", line)), parsed


@needs_gsm8k
def test_every_annotation_of_gsm8k_is_a_step(gsm8k):
    for row, parsed in gsm8k:
        calculations = re.findall(r"<<[^<>]*[\d.)][-+*/][^<>]*=", row["answer"])
        assert len(parsed["plan"].split("\n")) >= len(calculations), parsed


@needs_gsm8k
def test_every_calculation_of_gsm8k_is_in_the_plan_step_of_its_execution_step(gsm8k):
    for row, parsed in gsm8k:
        assert "\n".join(parsed["plan_steps"]) == parsed["plan"]
        steps = parse_main(row, keep_calculator=True)["execution_steps"]
        assert "\n".join(steps) == row["answer"].rpartition("####")[0].strip()
        for plan_step, step in zip(parsed["plan_steps"], steps, strict=True):
            calculations = re.findall(r"<<[^<>]*[\d.)][-+*/][^<>]*=", step)
            assert len(plan_step.split("\n")) >= max(1, len(calculations)), parsed


@needs_gsm8k
def test_hardly_a_plan_of_gsm8k_has_a_gap(gsm8k):
    with_gaps = sum("?" in parsed["plan"] for _, parsed in gsm8k)
    assert with_gaps < 0.11 * len(gsm8k)


@needs_gsm8k
def test_every_execution_of_gsm8k_ends_with_its_answer(gsm8k):
    for row, parsed in gsm8k:
        assert parsed["execution"].endswith(f"\n#### {parsed['answer']}")
        assert "<<" not in parsed["execution"]
        assert match_strict(parsed["execution"], row["answer"])


@needs_gsm8k
def test_socratic_test_split_is_read():
    dataset = load_gsm8k("test", "socratic")
    assert len(dataset) == 1319
    assert all(row["plan"].count("\n") + 1 == row["execution"].count("\n") for row in dataset)
    assert all(len(row["plan_steps"]) == len(row["execution_steps"]) > 0 for row in dataset)
    assert all("\n".join(row["plan_steps"]) == row["plan"] for row in dataset)
