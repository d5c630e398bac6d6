"""The word-level tokenizer gives every text back, and knows the special tokens of the model."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from hierbd3lm.backbones_hierbd3lm import add_special_tokens, special_token_ids, vocabulary_size
from hierbd3lm.configuration_hierbd3lm import SPECIAL_TOKENS, HierBD3LMConfig
from hierbd3lm.data.synthetic.config import SPLITS, SyntheticConfig
from hierbd3lm.data.synthetic.problems import generate_problems
from hierbd3lm.data.synthetic.wording import vocabulary_texts
from hierbd3lm.data.tokenization import PAD_TOKEN, UNK_TOKEN, train_tokenizer

CONFIG = SyntheticConfig()
COLUMNS = ("question", "plan", "execution")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(row[column] for row in generate_problems("train", 3000, CONFIG) for column in COLUMNS)


def plain_tokenizer(**special_tokens):
    """One that was made for something else: five words, `<eos>`, none of our tokens."""
    words = ["a", "b", "c", "<eos>", "<unk>"]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", **special_tokens)


@pytest.mark.parametrize("split", SPLITS)
def test_decode_gives_every_generated_text_back(tokenizer, split):
    for row in generate_problems(split, 300, CONFIG):
        for text in (row[column] for column in COLUMNS):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer.unk_token_id not in ids


def test_vocabulary_texts_make_a_tokenizer_that_knows_every_split(tokenizer):
    from_words = train_tokenizer(vocabulary_texts(CONFIG))
    assert set(from_words.get_vocab()) >= set(tokenizer.get_vocab())
    assert len(from_words) < 150
    for split in SPLITS:
        for row in generate_problems(split, 100, CONFIG):
            assert all(from_words.decode(from_words.encode(row[column])) == row[column] for column in COLUMNS)


@pytest.mark.parametrize(
    "text", ["12", " 12", "#### 1234567890", "Mia = 10 + 90 = 100\n#### 100", "\n\n  7", "0.5 , 3"]
)
def test_numbers_keep_their_digits_together_in_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("0.5 , 3", "0.5<|unk|> 3")  # " ," is no word of these texts


def test_digits_are_one_token_each_and_take_the_space_before_them(tokenizer):
    assert tokenizer.tokenize("12") == ["1", "2"]
    assert tokenizer.tokenize(" = 105") == [" =", " 1", "0", "5"]
    assert tokenizer.tokenize("Mia = Tom + 30\n#### 7") == ["Mia", " =", " Tom", " +", " 3", "0", "\n", "####", " 7"]


def test_every_digit_is_known_even_if_the_texts_have_none():
    tokenizer = train_tokenizer(["no number"])
    text = "".join(f" {digit}{digit}" for digit in range(10)) + "\n number"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_words_become_unk_and_are_seen_as_such(tokenizer):
    assert tokenizer.tokenize("Mia has zebras") == ["Mia", " has", UNK_TOKEN]
    assert tokenizer.decode(tokenizer.encode("Mia has zebras"), skip_special_tokens=True) == "Mia has"


def test_nothing_is_added_at_start_or_end(tokenizer):
    text = "Mia = Tom + 3"
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}


def test_special_tokens_are_single_ids_and_are_skipped_on_demand(tokenizer):
    text = "<|plan|>Mia = Tom + 12<|end|><|end|><|execution|><|mask|><|mask|><|pad|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Mia = Tom + 12"
    assert set(tokenizer.all_special_tokens) == {PAD_TOKEN, UNK_TOKEN, *SPECIAL_TOKENS.values()}


def test_training_twice_gives_the_same_ids():
    texts = [row["question"] for row in generate_problems("train", 100, CONFIG)]
    assert train_tokenizer(texts).get_vocab() == train_tokenizer(iter(texts)).get_vocab()


def test_saved_tokenizer_is_loaded_by_auto_tokenizer_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert special_token_ids(loaded) == special_token_ids(tokenizer)
    assert set(loaded.all_special_tokens) == set(tokenizer.all_special_tokens)
    assert (loaded.padding_side, loaded.model_input_names) == ("left", ["input_ids", "attention_mask"])
    for row in generate_problems("test", 50, CONFIG):
        assert loaded(row["question"])["input_ids"] == tokenizer(row["question"])["input_ids"]
        assert loaded.decode(loaded.encode(row["execution"])) == row["execution"]
    assert loaded.decode(loaded.encode("<|plan|>Mia = 12<|end|>"), skip_special_tokens=True) == "Mia = 12"


def test_special_token_ids_are_arguments_of_the_configuration(tokenizer):
    ids = special_token_ids(tokenizer)
    backbone = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    config = HierBD3LMConfig(backbone_config=backbone, **ids)
    for role, text in (SPECIAL_TOKENS | {"pad": PAD_TOKEN}).items():
        assert tokenizer.convert_ids_to_tokens(getattr(config, f"{role}_token_id")) == text


def test_pad_is_end_for_a_tokenizer_without_pad():
    tokenizer = plain_tokenizer()
    add_special_tokens(tokenizer)
    ids = special_token_ids(tokenizer)
    assert ids["pad_token_id"] == ids["end_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>")


def word_tokenizer(ids, **special_tokens):
    """`<unk>`, and a word `w<id>` for each id."""
    words = Tokenizer(WordLevel({"<unk>": 0} | {f"w{i}": i for i in ids}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special_tokens)


@pytest.mark.parametrize("pad_token", [None, "<pad>", "<unk>"])
def test_a_prepared_tokenizer_pads_on_the_left_and_is_saved_so(pad_token, tmp_path):
    tokenizer = word_tokenizer((1, 2, 3), pad_token=pad_token)
    add_special_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for ready in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        batch = ready(["w1 w9 w3", "w2"], padding=True, return_tensors="pt")
        assert list(batch) == ["input_ids", "attention_mask"]
        pad = special_token_ids(ready)["pad_token_id"]
        assert batch["input_ids"].tolist() == [[1, 0, 3], [pad, pad, 2]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
        assert ready.convert_ids_to_tokens(pad) == ("<pad>" if pad_token == "<pad>" else "<|end|>")


def test_a_pad_token_that_is_the_unknown_token_is_replaced_with_a_warning(capture_warnings):
    tokenizer = plain_tokenizer(pad_token="<unk>", extra_special_tokens=[*SPECIAL_TOKENS.values()])
    assert special_token_ids(tokenizer)["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>")
    add_special_tokens(tokenizer)
    assert tokenizer.pad_token == "<|end|>"
    assert ["pads with <unk>, its unknown token" in line for line in capture_warnings] == [True]


@pytest.mark.parametrize("ids", [(1, 2, 4, 5, 6), (1, 2, 7), (2,)])
def test_new_tokens_never_take_the_id_of_an_existing_one(ids):
    tokenizer = word_tokenizer(ids)
    before = tokenizer.get_vocab()
    with pytest.raises(
        ValueError, match=r"`tokenizer` must leave ids for new tokens, but <\|\w+\|> would take the id"
    ):
        add_special_tokens(tokenizer)
    assert tokenizer.get_vocab() == before
    assert tokenizer("w2").input_ids == [2] and tokenizer.decode([2]) == "w2"


def test_unused_ids_that_no_new_token_reaches_are_no_reason_to_refuse():
    tokenizer = word_tokenizer((1, 2, 50))
    add_special_tokens(tokenizer)
    assert vocabulary_size(tokenizer) == 51
    assert sorted(tokenizer.get_vocab().values()) == [0, 1, 2, 4, 5, 6, 7, 50]


def test_missing_special_tokens_are_named():
    tokenizer = plain_tokenizer(extra_special_tokens=["<|plan|>", "<|end|>"])
    with pytest.raises(ValueError, match=r"`tokenizer` must have the special tokens <\|mask\|>, <\|execution\|>:"):
        special_token_ids(tokenizer)


def test_add_special_tokens_adds_only_the_missing_ones_and_keeps_the_others():
    tokenizer = plain_tokenizer(eos_token="<eos>", extra_special_tokens=["<tool>", "<|end|>"])
    before = tokenizer.get_vocab()
    assert add_special_tokens(tokenizer) == 3
    after = tokenizer.get_vocab()
    assert {text: after[text] for text in before} == before and len(after) == len(before) + 3
    assert {"<eos>", "<tool>", *SPECIAL_TOKENS.values()} <= set(tokenizer.all_special_tokens)
    assert len(tokenizer.all_special_tokens) == len(set(tokenizer.all_special_tokens))
    assert add_special_tokens(tokenizer) == 0 and tokenizer.get_vocab() == after


def test_added_special_tokens_survive_saving(tmp_path):
    tokenizer = plain_tokenizer(eos_token="<eos>")
    assert add_special_tokens(tokenizer) == len(SPECIAL_TOKENS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert special_token_ids(loaded) == special_token_ids(tokenizer)
    assert add_special_tokens(loaded) == 0


def test_a_bpe_gives_any_text_back_and_splits_digits():
    texts = [row[column] for row in generate_problems("train", 200, CONFIG) for column in COLUMNS]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    assert len(tokenizer) <= 400
    for text in (*texts[:50], "Żółw: 12 naïve 🐢s cost $1,234.50\n\n#### 7"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode()) / 2
    assert special_token_ids(tokenizer)["mask_token_id"] == tokenizer.convert_tokens_to_ids("<|mask|>")


def test_a_bpe_needs_room_for_all_bytes():
    with pytest.raises(ValueError, match="`vocab_size` must be at least 261, but got 260"):
        train_tokenizer(["a"], vocab_size=260)
