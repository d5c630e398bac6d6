"""What the page shows while a question is answered: views of one model, or of two, after every forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.arguments import SYNTHETIC, DataArguments, find_saved_arguments
from ..data.collator import check_content, check_lengths, encode_example
from ..data.splits import load_split
from ..data.tokenization import count_unknown
from ..evaluation.checkpoints import load_model
from ..masking_hierbd3lm import PLAN
from ..modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from ..settings_hierbd3lm import SAMPLERS_OF, HierBD3LMGenerationConfig, resolve_settings
from .attention import HINT, picture_html
from .recording import Frame, Outcome, Recording
from .rendering import TokenTexts, figures_html, panel_html, segment_html, segment_title

NUM_EXAMPLES = 3
FIGURES = ("NFE", "tokens per forward pass", "seconds")
SETTINGS = (  # of generation, that the page has controls for
    *("sampler", *SAMPLERS_OF, "temperature", "top_p", "block_size", "max_plan_len", "max_execution_len", "seed"),
)
OF_DIFFUSION = {"sampler", *SAMPLERS_OF, "block_size"}  # those that an autoregressive model does not have


@dataclass(frozen=True)
class View:
    """HTML of one model's answer, and the plan as text once it is finished."""

    panels: dict[int, str]
    figures: str = ""
    plan: str | None = None


@dataclass
class Loaded:
    """A checkpoint.

    Args:
        name: of the folder, or of the repository on the Hub.
        examples: questions to choose from.
    """

    name: str
    model: HierBD3LMForBlockDiffusion
    tokenizer: PreTrainedTokenizerBase
    examples: list[str] = field(default_factory=list)
    texts: TokenTexts = field(init=False)

    def __post_init__(self):
        self.texts = TokenTexts(self.tokenizer)

    @classmethod
    def from_path(cls, path: str, device: str) -> "Loaded":
        """Load a checkpoint or an adapter."""
        folder = Path(path).resolve()
        name = "/".join(folder.parts[-2:]) if folder.name.startswith("checkpoint-") else folder.name
        return cls(name if folder.is_dir() else path, *load_model(path, device), example_questions(path))

    @cached_property
    def has_plan(self) -> bool:
        return PLAN in self.model.order.segments

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that apply to this model."""
        order, unused = self.model.order, set()
        if order.is_autoregressive:
            unused = OF_DIFFUSION
        elif order.is_joint:
            unused = {"block_size"}
        if not self.has_plan:
            unused = unused | {"max_plan_len"}
        return tuple(name for name in SETTINGS if name not in unused)

    def describe(self) -> list[str]:
        """Return facts about the model."""
        config, order = self.model.config, self.model.order
        sizes = dict.fromkeys(str(part.block_size) for part in order.parts)
        blocks = [] if order.is_autoregressive else [f"blocks of {' and '.join(sizes)}"]
        lengths = [config.question_len, *([config.plan_len] if self.has_plan else []), config.execution_len]
        return [
            config.algorithm,
            f"{self.model.num_parameters() / 1e6:.1f} M parameters",
            *blocks,
            f"up to {' + '.join(map(str, lengths))} tokens",
            str(self.model.device),
        ]

    def encode(self, question: str, plan: str | None) -> tuple[list[int], list[int] | None]:
        """Return the token ids of question and plan.

        Raises:
            ValueError: for a question that is empty or too long, and for texts that spell out a special token.
        """
        if not question.strip() and self.model.config.question_len:
            raise ValueError("`question` must not be empty")
        example = {"question": question, "plan": plan, "execution": ""}
        ids = encode_example(example, self.tokenizer, chat_template=self.model.config.chat_template)
        check_content(ids, self.model.config)
        check_lengths(ids | {"plan_ids": []}, self.model.config)  # a plan's length is checked by `generate`
        return ids["question_ids"], None if plan is None else ids["plan_ids"]

    def generation_settings(self, values: dict[str, Any], stage: str) -> HierBD3LMGenerationConfig:
        """Return the checkpoint's settings with `values` in their place, as far as they apply to this model.

        Raises:
            ValueError: for a value out of its range.
        """
        base = resolve_settings(self.model.generation_config, {"compile_steps": False})
        given = {name: value for name, value in values.items() if value is not None and name in self.settings}
        sampler = given.get("sampler", base.sampler)
        given = {name: value for name, value in given.items() if sampler in SAMPLERS_OF.get(name, (sampler,))}
        return resolve_settings(base, given | {"stage": stage})

    def record(self, question: str, plan: str | None, values: dict[str, Any]) -> Recording:
        """Start a generation.

        Args:
            plan: None if the model writes it; of no effect for a model without a plan.
        """
        plan = plan if self.has_plan else None
        question_ids, plan_ids = self.encode(question, plan)
        settings = self.generation_settings(values, "full" if plan is None else "execution")
        return Recording(self.model, question_ids, settings, plan_ids)

    def view(self, recording: Recording, frame: Frame, outcome: Outcome | None = None) -> View:
        """Return the view of a frame; with an outcome that of the end."""
        is_done, order = outcome is not None, recording.order
        panels, active = {}, max((segment for segment, its in frame.segments.items() if its), default=None)
        for segment in order.segments:
            tokens = frame.segments[segment]
            body = segment_html(tokens, self.texts, order, None if is_done else frame.step)
            is_busy = not is_done and segment == active
            given = bool(tokens) and all(token.step is None for token in tokens) and not is_busy
            if is_busy:
                note = f"denoising, step {frame.step}"
            elif given:
                note = "given"
            else:
                note = "" if tokens or is_done else "waits for the plan"
            panels[segment] = panel_html(segment_title(segment), body, note, is_busy)
        if outcome is None:
            return View(panels, figures_html(dict.fromkeys(FIGURES, "") | {"NFE": str(frame.step)}))
        output = outcome.output
        values = int(output.num_forward_passes), f"{float(output.tokens_per_forward):.2f}", f"{outcome.seconds:.2f}"
        figures = dict(zip(FIGURES, map(str, values), strict=True))
        if not output.finished.all():
            figures["end"] = "length limit"
        plan = self.tokenizer.decode(output.plan[0], skip_special_tokens=True) if self.has_plan else None
        return View(panels, figures_html(figures), plan)

    def empty_view(self) -> View:
        """Return the view before the first question."""
        panels = {segment: panel_html(segment_title(segment), "") for segment in self.model.order.segments}
        return View(panels, figures_html(dict.fromkeys(FIGURES, "")))

    def picture(self, recording: Recording) -> str:
        """Return the picture of the mask of a finished generation."""
        return picture_html(recording.order, recording.question_ids, recording.outcome.frame.segments, self.texts)


def example_questions(path: str) -> list[str]:
    """Return questions of the test split of synthetic problems, if a checkpoint was trained on them."""
    if find_saved_arguments(path) is None:
        return []
    data_args = DataArguments.load(path)
    return load_split(data_args, "test", NUM_EXAMPLES)["question"][:] if data_args.dataset == SYNTHETIC else []


@dataclass(frozen=True)
class Page:
    """The state of the whole page: what each model shows, the picture of the mask, and a message."""

    main: View
    twin: View | None = None
    picture: str = HINT
    message: str = ""


@dataclass
class Demo:
    """The models of the page.

    Args:
        twin: an autoregressive model beside the main one, if any.
    """

    main: Loaded
    twin: Loaded | None = None

    def __post_init__(self):
        if self.twin is not None and not self.twin.model.order.is_autoregressive:
            raise ValueError(
                f"`autoregressive` must be a checkpoint of algorithm 'ar', but {self.twin.name} is of "
                f"{self.twin.model.config.algorithm!r}"
            )

    def empty(self) -> Page:
        """Return the page before the first question."""
        return Page(self.main.empty_view(), None if self.twin is None else self.twin.empty_view())

    def answer(self, question: str, plan: str | None, values: dict[str, Any], pause: float = 0.0) -> Iterator[Page]:
        """Yield the page after every forward pass, of the main model first and then of the other.

        Args:
            plan: a plan to execute; None if each model writes its own.
            values: generation settings; None stands for the checkpoint's own.
            pause: seconds for which each step is shown at least. The seconds that are reported do not contain it.

        Raises:
            ValueError: for what a model refuses.
        """
        page = self.empty()
        recording = self.main.record(question, plan, values)
        for frame in recording.frames(pause):
            page = replace(page, main=self.main.view(recording, frame))
            yield page
        main = self.main.view(recording, recording.outcome.frame, recording.outcome)
        page = replace(page, main=main, picture=self.main.picture(recording), message=self._note(recording))
        yield page
        if self.twin is None:
            return
        try:
            recording = self.twin.record(question, plan, values)
            for frame in recording.frames(pause):
                yield replace(page, twin=self.twin.view(recording, frame))
        except ValueError as error:
            yield replace(page, message=f"{self.twin.name}: {error}")
            return
        yield replace(page, twin=self.twin.view(recording, recording.outcome.frame, recording.outcome))

    def _note(self, recording: Recording) -> str:
        unknown = count_unknown(recording.question_ids, self.main.tokenizer)
        if not unknown:
            return ""
        return f"{unknown} of the question's {len(recording.question_ids)} tokens are unknown to the model's tokenizer"
