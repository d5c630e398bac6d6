"""Chat messages: a template that renders a plan as reasoning content, and answers that become messages."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import SPECIAL_TOKENS
from .decoding import decode_text

# A question as a model without a chat template was trained on it, and an answer in the layout of a sequence.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- if message.get('reasoning_content') is not none -%}"
    "<|plan|>{{ message['reasoning_content'] }}<|end|>"
    "{%- endif -%}"
    "<|execution|>{{ message['content'] }}<|end|>"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
)
PLAN, EXECUTION, END = (SPECIAL_TOKENS[role] for role in ("plan", "execution", "end"))


def answer_messages(output: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Return the answers of `generate` as messages, one for each row.

    Args:
        output: a [`~denoising_hierbd3lm.HierBD3LMGenerationOutput`].

    Returns:
        dicts with `role` ("assistant"), `reasoning_content` (the plan) and `content` (the execution).
    """
    texts = ([decode_text(ids, tokenizer) for ids in getattr(output, name)] for name in ("plan", "execution"))
    return [_message(plan, execution) for plan, execution in zip(*texts, strict=True)]


def parse_answer(text: str) -> dict[str, str]:
    """Parse an answer that was decoded with its special tokens; see [`answer_messages`].

    Args:
        text: `<|plan|>...<|end|><|execution|>...<|end|>`, with or without the question before it. An answer that was
            cut off may lack an `<|end|>` or the execution, and one of a model without a plan has none.

    Raises:
        ValueError: if the text has neither a plan nor an execution.
    """
    if PLAN not in text and EXECUTION not in text:
        raise ValueError(f"`text` must contain {PLAN} or {EXECUTION}: decode with `skip_special_tokens=False`")
    before, _, execution = text.partition(EXECUTION)
    plan = before.partition(PLAN)[2]
    return _message(plan.partition(END)[0], execution.partition(END)[0])


def _message(plan: str, execution: str) -> dict[str, str]:
    return {"role": "assistant", "reasoning_content": plan, "content": execution}
