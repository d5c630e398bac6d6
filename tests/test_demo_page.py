"""The page in a real browser: headless Chromium, driven by Playwright."""

import re
import shutil

import pytest

from hierbd3lm.demo.answers import Demo

from .test_demo_answers import QUESTION, make_loaded, shown
from .test_demo_rendering import SCRIPT
from .tiny_algorithms import OWN_SIZE

demo_page = pytest.importorskip("hierbd3lm.demo.page", reason='the page needs gradio: `pip install -e ".[demo]"`')

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MINUTE = 60_000


@pytest.fixture(scope="module")
def loaded():
    return make_loaded(), make_loaded("twin", algorithm="ar", **OWN_SIZE)


@pytest.fixture(scope="module")
def address(loaded):
    """The page of two tiny models, on a free port of this machine."""
    blocks = demo_page.build(Demo(*loaded))
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **demo_page.launch_arguments())
    yield url
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page at a width; checks at the end that nothing was asked of another machine and no script failed."""
    contexts, requests, faults = [], [], []

    def open_page(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MINUTE)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.goto(address)
        page.locator("#question textarea").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
    assert requests and [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def ask(page, question=QUESTION):
    page.locator("#question textarea").fill(question)
    page.locator("#run").click()


def await_end(page):
    """Wait until both models have answered."""
    page.locator("#twin-figures dd").nth(2).filter(has_text=re.compile(r"\d\.\d\d")).wait_for()


def await_refusal(page, message):
    page.get_by_role("alert").filter(has_text=message).wait_for()


def text_of(page, panel):
    texts = page.locator(f"{panel} .tokens .tok:not(.end)").all_text_contents()
    return "".join(texts).replace("⏎", "")


def generated(loaded, question=QUESTION, **settings):
    return loaded.model.generate(**loaded.tokenizer(question, return_tensors="pt"), **settings)


def executed(loaded, plan):
    plan_ids = loaded.tokenizer(plan, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return generated(loaded, plan_ids=plan_ids, stage="execution")


def test_what_a_control_holds_is_a_number_where_it_is_one():
    texts = ("", " ", None, "3", "0.5", "1e-2", "many", True)
    assert [*map(demo_page.read_value, texts)] == [None, None, None, 3, 0.5, 0.01, "many", True]


@pytest.mark.slow
def test_a_question_is_answered_live_then_its_plan_is_edited_and_executed(opened, loaded):
    page, (main, twin) = opened(), loaded
    page.locator("#settings button").first.click()
    page.locator("#set-pause input[type=number]").fill("200")
    page.locator("#set-pause input[type=number]").blur()
    ask(page)
    page.locator("#main-plan .masked").first.wait_for()  # the plan is denoised before the eyes
    assert page.locator("#main-plan [aria-busy=true]").count() == 1
    assert page.locator("#main-execution .tok").count() == 0
    page.locator("#main-execution [aria-busy=true]").wait_for()
    await_end(page)
    output = generated(main)
    assert text_of(page, "#main-plan") == shown(main, output.plan)
    assert text_of(page, "#main-execution") == shown(main, output.execution)
    assert text_of(page, "#twin-plan") == shown(twin, generated(twin).plan)
    figures = page.locator("#main-figures dd").all_text_contents()
    assert figures[0] == str(int(output.num_forward_passes))
    tooltip = page.locator("#main-plan .tok").first.get_attribute("title")
    assert re.fullmatch(r"step \d+, confidence \d+\.\d %", tooltip)

    page.locator("#edit").click()
    box = page.locator("#plan-text textarea")
    box.wait_for()
    assert box.input_value() == shown(main, output.plan)
    page.wait_for_function("document.activeElement === document.querySelector('#plan-text textarea')")
    box.fill("red")
    page.locator("#execute").click()
    page.locator("#main-plan .tok.given").first.wait_for()
    page.locator("#main-figures dd").nth(2).filter(has_text=re.compile(r"\d\.\d\d")).wait_for()
    assert text_of(page, "#main-plan") == "red"
    edited = shown(main, executed(main, "red").execution)
    assert text_of(page, "#main-execution") == edited != shown(main, output.execution)


@pytest.mark.slow
def test_wrong_inputs_are_refused_with_a_clear_message(opened, loaded):
    page = opened()
    ask(page, "x" * 65)
    await_refusal(page, "`question` must have at most question_len=64 tokens, but got 65")
    page.locator("#settings button").first.click()
    page.locator("#set-threshold :is(textarea, input)").fill("1.5")
    ask(page)
    await_refusal(page, "`threshold` must be a number in (0, 1], but got 1.5")
    page.locator("#set-threshold :is(textarea, input)").fill("")  # the checkpoint's own
    ask(page)
    await_end(page)
    assert page.get_by_role("alert").count() == 0
    assert text_of(page, "#main-plan") == shown(loaded[0], generated(loaded[0]).plan)


@pytest.mark.slow
def test_the_sampler_decides_which_settings_there_are(opened, loaded):
    page = opened()
    page.locator("#settings button").first.click()
    page.locator("#set-threshold").wait_for()
    assert page.locator("#set-num_steps").is_hidden()
    page.locator("#set-sampler input").click()
    page.get_by_role("option", name="ancestral").click()
    page.locator("#set-num_steps").wait_for()
    page.locator("#set-threshold").wait_for(state="hidden")
    page.locator("#set-num_steps :is(textarea, input)").fill("2")
    ask(page)
    await_end(page)
    output = generated(loaded[0], sampler="ancestral", num_steps=2)
    assert text_of(page, "#main-plan") == shown(loaded[0], output.plan)
    assert page.locator("#main-figures dd").first.text_content() == str(int(output.num_forward_passes))


@pytest.mark.slow
def test_the_mask_shows_what_a_token_sees_by_pointer_and_by_keyboard(opened):
    page = opened()
    ask(page)
    page.locator(".strip .t").nth(len(QUESTION)).hover()  # while the other model answers
    page.locator(".attention .caption").filter(has_text="(plan)").wait_for()
    await_end(page)
    assert "(plan)" in page.locator(".attention .caption").text_content()
    num_tokens = page.locator(".strip .t").count()
    first_of_plan = len(QUESTION)
    page.locator(".strip .t").nth(first_of_plan).hover()
    caption = page.locator(".attention .caption")
    caption.filter(has_text="(plan)").wait_for()
    seen = page.locator(".strip .t.seen")
    assert seen.count() == first_of_plan + 4  # the question and its own block
    assert caption.text_content().endswith(f"sees {first_of_plan + 4} of {num_tokens} tokens.")
    page.locator(".strip").focus()
    page.keyboard.press("Home")
    assert seen.count() == first_of_plan and page.locator(".strip .t.query").get_attribute("data-i") == "0"
    page.keyboard.press("End")
    assert seen.count() == num_tokens
    page.keyboard.press("ArrowLeft")
    assert page.locator(".strip .t.query").get_attribute("data-i") == str(num_tokens - 2)


@pytest.mark.slow
def test_markup_of_a_question_is_shown_and_not_run(opened):
    page = opened()
    ask(page, SCRIPT + '<img src=x onerror="alert(2)">'[: 64 - len(SCRIPT)])
    await_end(page)
    assert SCRIPT in "".join(page.locator(".strip .t").all_text_contents())
    assert page.locator("#picture script, #picture img").count() == 0


@pytest.mark.slow
def test_a_generation_can_be_stopped_and_another_started(opened, loaded):
    page = opened()
    page.locator("#settings button").first.click()
    page.locator("#set-pause input[type=number]").fill("500")
    page.locator("#set-pause input[type=number]").blur()
    ask(page)
    page.locator("#main-plan .masked").first.wait_for()
    page.locator("#stop").click()
    page.locator("#main-plan .note").filter(has_text="stopped").wait_for()
    page.locator("#set-pause input[type=number]").fill("0")
    page.locator("#set-pause input[type=number]").blur()
    ask(page)
    await_end(page)
    assert text_of(page, "#main-plan") == shown(loaded[0], generated(loaded[0]).plan)


@pytest.mark.slow
def test_the_page_is_used_by_keyboard_alone(opened, loaded):
    page = opened()
    page.locator("#question textarea").focus()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    await_end(page)
    page.locator("#question textarea").focus()
    for _ in range(3):  # Answer, Stop, Edit the plan
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#plan-text textarea").wait_for()
    page.wait_for_function("document.activeElement === document.querySelector('#plan-text textarea')")
    page.keyboard.press("Control+A")
    page.keyboard.type("green")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#main-plan .tok.given").first.wait_for()
    assert text_of(page, "#main-plan") == "green"


def contrast(page, selector):
    """The contrast of an element's text against what lies behind it (WCAG 2, 1.4.3)."""
    return page.evaluate(
        """(selector) => {
          const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const luminance = (colour) => colour.slice(0, 3).map((value) => value / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const element = document.querySelector(selector);
          let behind = element;
          const background = (e) => parse(getComputedStyle(e).backgroundColor);
          while (behind && (background(behind)[3] ?? 1) === 0) behind = behind.parentElement;
          const shades = [luminance(parse(getComputedStyle(element).color)),
            behind ? luminance(background(behind)) : 1].sort((a, b) => b - a);
          return (shades[0] + 0.05) / (shades[1] + 0.05);
        }""",
        selector,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_width_and_is_readable(opened, width, scheme):
    page = opened(width, color_scheme=scheme)
    ask(page)
    await_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = [f".legend .c{number}" for number in range(5)]
    for selector in ("h1", ".facts", ".figures dt", ".panel h3", ".legend .plain", ".attention .caption", *colours):
        assert contrast(page, selector) >= 4.5, selector
