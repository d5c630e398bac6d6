"""What the page shows while a question is answered, without a browser."""

import sys

import pytest
import torch

from hierbd3lm.data.tokenization import train_tokenizer
from hierbd3lm.demo import app
from hierbd3lm.demo.answers import SETTINGS, Demo, Loaded
from hierbd3lm.masking_hierbd3lm import EXECUTION, PLAN
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.settings_hierbd3lm import GenerationSettings

from .test_demo_rendering import SCRIPT, Tags
from .tiny_algorithms import OWN_SIZE
from .tiny_tokenizer import make_config_for, make_tokenizer

QUESTION = "2 and 3?"


def make_loaded(name="model", **overrides):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    lengths = {"question_len": 64, "plan_len": 8, "execution_len": 16}
    model = HierBD3LMForBlockDiffusion(make_config_for(tokenizer, **lengths | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return Loaded(name, model, tokenizer)


@pytest.fixture(scope="module")
def main():
    return make_loaded()


@pytest.fixture(scope="module")
def twin():
    return make_loaded("twin", algorithm="ar", **OWN_SIZE)


def text_of(panel):
    """The text of the tokens of a panel, as it was before it became HTML."""
    body = panel[panel.index('<div class="tokens">') :]
    if 'class="empty"' in body:
        return ""
    return "".join(text for text in Tags(body).texts if text not in ("⏎", "end"))


def shown(loaded, ids):
    return loaded.tokenizer.decode(ids[0], skip_special_tokens=True)


def answer(demo, question=QUESTION, plan=None, **values):
    return [*demo.answer(question, plan, values, pause=1e-6)]


def test_the_page_ends_with_what_generate_writes(main, twin):
    pages = answer(Demo(main, twin))
    for view, loaded in ((pages[-1].main, main), (pages[-1].twin, twin)):
        output = loaded.model.generate(**loaded.tokenizer(QUESTION, return_tensors="pt"))
        assert view.plan == shown(loaded, output.plan)
        for segment, ids in ((PLAN, output.plan), (EXECUTION, output.execution)):
            assert text_of(view.panels[segment]) == shown(loaded, ids)
        figures = Tags(view.figures).texts
        assert figures[:2] == ["NFE", str(int(output.num_forward_passes))]
        assert figures[2:4] == ["tokens per forward pass", f"{float(output.tokens_per_forward):.2f}"]
        assert figures[4] == "seconds" and float(figures[5]) >= 0
    assert 'class="mask"' in pages[-1].picture and 'class="mask"' not in pages[0].picture


def test_the_plan_is_denoised_before_the_execution_and_the_twin_comes_last(main, twin):
    pages = answer(Demo(main, twin))
    busy = [
        [(name, segment) for name in ("main", "twin") for segment in (PLAN, EXECUTION)
         if 'aria-busy="true"' in getattr(page, name).panels[segment]]
        for page in pages
    ]  # fmt: skip
    assert all(len(places) <= 1 for places in busy)
    order = [*dict.fromkeys(place for places in busy for place in places)]
    assert order == [("main", PLAN), ("main", EXECUTION), ("twin", PLAN), ("twin", EXECUTION)][: len(order)]
    assert order[:2] == [("main", PLAN), ("main", EXECUTION)] and ("twin", PLAN) in order
    assert any('class="tok masked"' in page.main.panels[PLAN] for page in pages)


def test_an_edited_plan_is_executed_and_its_tokens_are_marked_as_given(main, twin):
    page = answer(Demo(main, twin), plan="red")[-1]
    for view, loaded in ((page.main, main), (page.twin, twin)):
        plan_ids = loaded.tokenizer("red", add_special_tokens=False, return_tensors="pt")["input_ids"]
        question = loaded.tokenizer(QUESTION, return_tensors="pt")
        output = loaded.model.generate(**question, plan_ids=plan_ids, stage="execution")
        assert text_of(view.panels[PLAN]) == view.plan == "red" and 'class="tok given"' in view.panels[PLAN]
        assert text_of(view.panels[EXECUTION]) == shown(loaded, output.execution)


def test_settings_are_those_of_the_controls_and_else_of_the_checkpoint(main):
    base = main.model.generation_config
    main.model.generation_config = type(base)(threshold=0.4, num_steps=3)
    try:
        given = {"temperature": 0.7, "seed": 3, "threshold": None, "num_steps": 5, "block_size": 2}
        settings = main.generation_settings(given, "full")
        assert (settings.temperature, settings.seed, settings.threshold) == (0.7, 3, 0.4)
        assert (settings.num_steps, settings.block_size) == (3, 2)  # the sampler does not read `num_steps`
        assert main.generation_settings({"sampler": "ancestral", "num_steps": 5}, "full").num_steps == 5
    finally:
        main.model.generation_config = base
    output = main.model.generate(**main.tokenizer(QUESTION, return_tensors="pt"), temperature=0.9, seed=5)
    assert answer(Demo(main), temperature=0.9, seed=5)[-1].main.plan == shown(main, output.plan)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1.5}, r"`threshold` must be a number in \(0, 1\], but got 1.5"),
        ({"temperature": -1}, "`temperature` must be a finite number >= 0, but got -1"),
        ({"temperature": "warm"}, "`temperature` must be a finite number >= 0, but got 'warm'"),
        ({"sampler": "ancestral", "num_steps": 0}, "`num_steps` must be an integer >= 1, but got 0"),
        ({"block_size": 5}, "`block_size` must divide"),
        ({"max_plan_len": 3}, "`max_plan_len` must be a multiple of the block size 4"),
        ({"seed": -1}, "`seed` must be an integer >= 0"),
    ],
)
def test_wrong_values_are_refused_in_generate_s_own_words(main, values, message):
    with pytest.raises(ValueError, match=message):
        answer(Demo(main), **values)
    with pytest.raises(ValueError, match=message):
        main.model.generate(**main.tokenizer(QUESTION, return_tensors="pt"), **values)


@pytest.mark.parametrize(
    ("question", "plan", "message"),
    [
        ("x" * 65, None, "`question` must have at most question_len=64 tokens, but got 65"),
        (" \n", None, "`question` must not be empty"),
        ("a <|mask|> b", None, "mask"),
        ("a", "x" * 8, "`plan_ids` must have at most plan_len - 1 = 7 tokens, but got 8"),
        ("a", "x <|plan|>", "plan"),
    ],
)
def test_texts_that_do_not_fit_are_refused(main, question, plan, message):
    with pytest.raises(ValueError, match=message):
        answer(Demo(main), question, plan)


def test_what_the_twin_refuses_is_said_beside_the_main_answer(main):
    short = make_loaded("twin", algorithm="ar", question_len=4, **OWN_SIZE)
    pages = answer(Demo(main, short))
    assert pages[-1].message == "twin: `question` must have at most question_len=4 tokens, but got 8"
    assert pages[-1].main.plan is not None


def test_the_twin_must_be_autoregressive(main):
    with pytest.raises(ValueError, match="must be a checkpoint of algorithm 'ar', but model is of 'hier'"):
        Demo(main, main)


def test_a_question_full_of_markup_stays_text(main, twin):
    for page in answer(Demo(main, twin), SCRIPT, plan="<b>"):
        for source in (page.picture, *page.main.panels.values(), *page.twin.panels.values()):
            assert "<script" not in source and "<b>" not in source
    assert SCRIPT in "".join(Tags(page.picture).texts)


def test_models_without_a_plan_and_of_other_orders_are_shown():
    for overrides in (
        {"plan_len": 0},
        {"algorithm": "bd3lm"},
        {"hierarchical_mask": False},
        {"joint": True, **OWN_SIZE},
    ):
        loaded = make_loaded(**overrides)
        assert set(loaded.empty_view().panels) == {*loaded.model.order.segments}
        view = answer(Demo(loaded), plan=None)[-1].main
        output = loaded.model.generate(**loaded.tokenizer(QUESTION, return_tensors="pt"))
        assert text_of(view.panels[EXECUTION]) == shown(loaded, output.execution)
        assert (view.plan is None) == (not loaded.has_plan)


def test_every_model_has_the_settings_that_apply_to_it(main, twin):
    assert main.settings == SETTINGS
    assert set(twin.settings) == {"temperature", "top_p", "max_plan_len", "max_execution_len", "seed"}
    unused = {"stage", "fill_after_end", "max_new_tokens", "compile_steps"}
    assert {*SETTINGS, *unused} == {*GenerationSettings.__dataclass_fields__}


def test_unknown_words_of_a_question_are_counted():
    tokenizer = train_tokenizer(["a b c"])
    config = make_config_for(tokenizer, question_len=16)
    loaded = Loaded("words", HierBD3LMForBlockDiffusion(config).eval(), tokenizer)
    note = answer(Demo(loaded), "a b xyz")[-1].message
    assert note == "1 of the question's 3 tokens are unknown to the model's tokenizer"


# The command line


def test_the_command_line_reads_the_environment_of_a_space(monkeypatch):
    monkeypatch.setenv(app.MODEL_VARIABLE, "me/model")
    args = app.parse_arguments([])
    assert (args.model, args.autoregressive, args.port, args.share) == ("me/model", None, None, False)
    args = app.parse_arguments(["dir", "--autoregressive", "twin", "--port", "80", "--share", "true"])
    assert (args.model, args.autoregressive, args.port, args.share) == ("dir", "twin", 80, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "MODEL must be given"), (["a", "--share", "maybe"], "must be true or false, but got 'maybe'")],
)
def test_a_wrong_command_line_is_refused(argv, message, monkeypatch, capsys):
    monkeypatch.delenv(app.MODEL_VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        app.main(argv)
    assert message in capsys.readouterr().err


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r'run `pip install -e "\.\[demo\]"`'):
        app.main(["somewhere"])
