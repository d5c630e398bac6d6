"""Encoding of texts; of questions through the chat template of the tokenizer or as they are."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Defines the function that chat templates call for the current date, as one with a fixed date.
FIXED_DATE = "{% macro strftime_now(format) %}01 January 2026{% endmacro %}{{ '' }}"


def encode_question(question: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[int]:
    """Encode a question; see [`encode_questions`]."""
    return encode_questions([question], tokenizer, chat_template)[0]


def encode_questions(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> list[list[int]]:
    """Encode questions for training, evaluation and generation.

    Args:
        chat_template: `config.chat_template`. If True, the questions are rendered by [`render_question`], and the
            template alone adds special tokens; otherwise the tokenizer adds its own, such as BOS.
    """
    texts = [render_question(question, tokenizer) for question in questions] if chat_template else questions
    return encode_texts(texts, tokenizer, add_special_tokens=not chat_template)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[int]:
    """Encode a text; see [`encode_texts`]."""
    return encode_texts([text], tokenizer, add_special_tokens)[0]


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> list[list[int]]:
    """Encode texts, of any length without a warning.

    Raises:
        ValueError: for a text with a lone surrogate, which is no Unicode.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text must be Unicode, but has the lone surrogate {text[error.start]!r}") from error
    if not texts:
        return []
    settings = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), **settings)["input_ids"]


def render_question(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a question through the chat template of a tokenizer, as in [`render_messages`]: one user turn."""
    return render_messages([{"role": "user", "content": question}], tokenizer)


def render_messages(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Render messages and the generation prompt through the chat template of a tokenizer.

    Templates that state the current date get a fixed one, so that training and evaluation render the same.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("`chat_template` must be False for a tokenizer without a chat template, but got True")
    template = tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        messages,
        chat_template=FIXED_DATE + template if "strftime_now" in template else template,
        tokenize=False,
        add_generation_prompt=True,
    )
