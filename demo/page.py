"""Layout and events of the page, in Gradio."""

from collections.abc import Iterator
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..masking_hierbd3lm import PLAN, SEGMENT_NAMES
from ..settings_hierbd3lm import SAMPLERS, SAMPLERS_OF, GenerationSettings
from .answers import Demo, Loaded, Page, View
from .attention import HINT
from .rendering import legend_html, message_html

FOLDER = Path(__file__).parent
HELP = {item.name: item.metadata["help"] for item in fields(GenerationSettings)}
SYSTEM_FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "Menlo", "Consolas", "monospace")
PAUSE = 80  # milliseconds
MARK_AS_STOPPED = """() => document.querySelectorAll(".panel[aria-busy=true]").forEach((panel) => {
  panel.setAttribute("aria-busy", "false");
  panel.querySelector(".note").textContent = "stopped";
})"""
QUEUE = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "trigger_mode": "multiple",  # in the other modes a click just after a stop is lost
    "show_progress": "hidden",
    "api_visibility": "private",
}


def launch_arguments() -> dict[str, Any]:
    """Return the arguments of `launch` that belong to the page. No resource comes from the network."""
    theme = gr.themes.Base(primary_hue="sky", neutral_hue="slate", font=SYSTEM_FONTS[0], font_mono=SYSTEM_FONTS[1])
    return {"theme": theme, "css_paths": FOLDER / "page.css", "footer_links": [], "ssr_mode": False}


def build(demo: Demo) -> gr.Blocks:
    """Build the page of one model, or of two."""
    with gr.Blocks(title="hierbd3lm", analytics_enabled=False) as blocks:
        html(_head_html(), "head")
        question = gr.Textbox(label="Question", lines=1, max_lines=8, autofocus=True, elem_id="question")
        with gr.Row(elem_id="actions"):
            run = gr.Button("Answer", variant="primary", elem_id="run", size="md", min_width=100)
            stop = gr.Button("Stop", elem_id="stop", size="md", min_width=100)
            edit = gr.Button("Edit the plan", elem_id="edit", size="md", min_width=100, visible=demo.main.has_plan)
        if demo.main.examples:
            gr.Examples([[one] for one in demo.main.examples], [question], label="Problems of the test split")
        message = html("", "message")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            pause, controls = _controls(demo.main)
        with gr.Row(elem_id="models", equal_height=False):
            with gr.Column(min_width=300):
                main = _Side(demo.main, "main", edit if demo.main.has_plan else None)
            if demo.twin is not None:
                with gr.Column(min_width=300):
                    twin = _Side(demo.twin, "twin")
        html(legend_html(), "legend")
        with gr.Accordion("Attention mask of this input", open=True, elem_id="attention"):
            picture = html(HINT, "picture", js_on_load=(FOLDER / "picture.js").read_text(encoding="utf-8"))

        editor = main.editor
        outputs = [message, picture, *main.outputs, *([] if demo.twin is None else twin.outputs)]
        outputs += [] if editor is None else editor.outputs

        def show(page: Page, has_new_picture: bool) -> list[Any]:
            views = [page.main, *([] if page.twin is None else [page.twin])]
            values = [message_html(page.message, is_error=False), page.picture if has_new_picture else gr.skip()]
            for view in views:
                values += [view.figures, *(gr.HTML(panel, visible=True) for panel in view.panels.values())]
            return values + ([] if editor is None else editor.closed(page.main))

        def answer(question_text: str, plan: str | None, pause_ms: float, *values: Any) -> Iterator[list[Any]]:
            settings = dict(zip(controls, map(read_value, values), strict=True))
            try:
                picture_before = None
                for page in demo.answer(question_text, plan, settings, (pause_ms or 0) / 1000):
                    # what is pointed at in the picture stays so while the other model answers
                    yield show(page, has_new_picture=page.picture != picture_before)
                    picture_before = page.picture
            except ValueError as error:
                yield [message_html(str(error)), *[gr.skip()] * (len(outputs) - 1)]

        def answer_freely(question_text: str, *rest: Any) -> Iterator[list[Any]]:
            yield from answer(question_text, None, *rest)

        inputs = [pause, *controls.values()]
        events = [
            trigger(answer_freely, [question, *inputs], outputs, **QUEUE) for trigger in (run.click, question.submit)
        ]
        if editor is not None:
            events.append(editor.execute.click(answer, [question, editor.text, *inputs], outputs, **QUEUE))
        stop.click(None, cancels=events, js=MARK_AS_STOPPED)
    return blocks


def html(value: str, elem_id: str, **kwargs: Any) -> gr.HTML:
    """Make a component of HTML without Gradio's own styles."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, **({"js_on_load": None} | kwargs))


class _Side:
    """The components of one model: its name and figures, and a panel for each segment.

    Args:
        edit: button that opens an editor of the plan, if any.
    """

    def __init__(self, loaded: Loaded, elem_id: str, edit: gr.Button | None = None):
        view = loaded.empty_view()
        facts = " · ".join(loaded.describe())
        html(f'<h2>{escape(loaded.name)}</h2><p class="facts">{escape(facts)}</p>', f"{elem_id}-name")
        self.figures, self.panels, self.editor = html(view.figures, f"{elem_id}-figures"), {}, None
        for segment, panel in view.panels.items():
            self.panels[segment] = html(panel, f"{elem_id}-{SEGMENT_NAMES[segment]}")
            if segment == PLAN and edit is not None:
                self.editor = _Editor(self.panels[segment], edit)
        self.outputs = [self.figures, *self.panels.values()]


class _Editor:
    """Puts a text box in place of the panel of the plan, and executes what it holds."""

    def __init__(self, panel: gr.HTML, edit: gr.Button):
        self.panel, self.edit = panel, edit
        self.text = gr.Textbox(label="Plan", lines=3, max_lines=16, visible=False, elem_id="plan-text")
        with gr.Row(elem_id="edit-actions", visible=False) as self.actions:
            self.execute = gr.Button(
                "Execute this plan", size="md", variant="primary", elem_id="execute", min_width=120
            )
            self.cancel = gr.Button("Cancel", size="md", elem_id="cancel", min_width=100)
        self.outputs = [self.text, self.edit, self.actions]
        switched = [self.panel, *self.outputs]
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.edit.click(lambda: self.visibility(True), None, switched, **quick).then(
            None, None, None, js="() => document.querySelector('#plan-text textarea').focus()"
        )
        self.cancel.click(lambda: self.visibility(False), None, switched, **quick)

    def visibility(self, is_open: bool) -> list[Any]:
        """Return updates of the panel, the text box and the buttons."""
        panel, edit = gr.HTML(visible=not is_open), gr.Button(interactive=not is_open)
        return [panel, gr.Textbox(visible=is_open), edit, gr.Row(visible=is_open)]

    def closed(self, view: View) -> list[Any]:
        """Return updates of the text box, which holds the plan once that is finished, and of the buttons."""
        text = gr.Textbox(visible=False) if view.plan is None else gr.Textbox(view.plan, visible=False)
        return [text, *self.visibility(False)[2:]]


def _head_html() -> str:
    return (
        "<h1>Plan first, then execute</h1>"
        "<p>A block diffusion language model denoises a plan from the question, then the execution from question and "
        "plan. The plan can be edited and executed again.</p>"
    )


def _controls(loaded: Loaded) -> tuple[gr.Slider, dict[str, Any]]:
    """Make the controls of the settings that apply to a model.

    Numbers are texts: an empty one stands for the default, and what is no number is refused by `generate`.
    """
    settings, controls = loaded.model.generation_config, {}
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    with gr.Row():
        for name in loaded.settings:
            value = getattr(settings, name)
            labels = {"label": name, "info": HELP[name], "elem_id": f"set-{name}", "min_width": 200}
            labels["visible"] = settings.sampler in SAMPLERS_OF.get(name, (settings.sampler,))
            if name == "sampler":
                controls[name] = gr.Dropdown([*SAMPLERS], value=value, **labels)
            elif isinstance(value, bool):
                controls[name] = gr.Checkbox(value, **labels)
            else:
                controls[name] = gr.Textbox("" if value is None else str(value), placeholder="default", **labels)
        info = "Milliseconds for which each step is shown at least."
        pause = gr.Slider(0, 500, PAUSE, step=10, label="pause", info=info, elem_id="set-pause", min_width=200)
    if "sampler" in controls:
        dependent = [name for name in controls if name in SAMPLERS_OF]
        controls["sampler"].change(
            lambda sampler: [gr.update(visible=sampler in SAMPLERS_OF[name]) for name in dependent],
            controls["sampler"],
            [controls[name] for name in dependent],
            **quick,
        )
    return pause, controls


def read_value(value: str | bool | None) -> str | bool | int | float | None:
    """Return what a control holds: a number where it is one, None where it is empty."""
    if not isinstance(value, str) or not value.strip():
        return value if isinstance(value, bool) else None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
