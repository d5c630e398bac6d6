"""Prompts of requests: messages of a chat, and questions as texts or token ids."""

from transformers import PreTrainedTokenizerBase

from ..configuration_hierbd3lm import HierBD3LMConfig
from ..data.questions import encode_question, encode_text, render_messages
from ..evaluation.prompts import Prompt
from .answers import check_prompt


def encode_messages(
    messages: list[dict[str, str]], plan: str | None, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig
) -> Prompt:
    """Encode a chat: one user message as in training, several messages through the chat template of the tokenizer.

    Raises:
        ValueError: if the last message is not the user's, for several messages to a model without a chat template, and
            for a question or plan that the model does not accept.
    """
    if messages[-1]["role"] != "user":
        raise ValueError(f"`messages` must end with one of the role 'user', but got {messages[-1]['role']!r}")
    if len(messages) == 1:
        ids = encode_question(messages[0]["content"], tokenizer, config.chat_template)
    elif config.chat_template:
        ids = encode_text(render_messages(messages, tokenizer), tokenizer, add_special_tokens=False)
    else:
        raise ValueError(
            f"`messages` must be one message of the user for this model, which is trained on questions without a chat "
            f"template, but got {len(messages)} messages"
        )
    return make_prompt(ids, plan, tokenizer, config)


def encode_question_or_ids(
    question: str | list[int], plan: str | None, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig
) -> Prompt:
    """Encode a question as it is, without a chat template; token ids are taken as they are.

    Raises:
        ValueError: for token ids outside the vocabulary, and for a question or plan that the model does not accept.
    """
    if isinstance(question, str):
        return make_prompt(encode_question(question, tokenizer, chat_template=False), plan, tokenizer, config)
    if unknown := [token for token in question if not 0 <= token < config.vocab_size]:
        raise ValueError(f"`prompt` must have token ids from 0 to {config.vocab_size - 1}, but got {unknown[0]}")
    return make_prompt(question, plan, tokenizer, config)


def make_prompt(
    question_ids: list[int], plan: str | None, tokenizer: PreTrainedTokenizerBase, config: HierBD3LMConfig
) -> Prompt:
    """Return the prompt.

    Raises:
        ValueError: for a question or plan that the model does not accept.
    """
    plan_ids = None if plan is None else encode_text(plan, tokenizer, add_special_tokens=False)
    prompt = Prompt(0, question_ids, plan_ids, too_long=[])
    check_prompt(prompt, config)
    return prompt
