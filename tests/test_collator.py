"""The layout of a batch, against a reference that goes token by token."""

import pickle

import pytest
import torch

from hierbd3lm.data.collator import (
    HierarchicalDataCollator,
    collate_questions,
    encode_example,
    example_length,
    over_long_segments,
    segment_lengths,
)

from .tiny import FIRST_CONTENT_ID, make_config
from .tiny_tokenizer import make_config_for, make_tokenizer

KEYS = ("input_ids", "segment_ids", "block_ids", "position_ids", "labels")


def make_examples(lengths, seed=0):
    """Examples of random ids; `lengths` are (question, plan, execution) content tokens."""
    generator = torch.Generator().manual_seed(seed)
    names = ("question_ids", "plan_ids", "execution_ids")
    return [
        {
            name: torch.randint(FIRST_CONTENT_ID, 40, (n,), generator=generator).tolist()
            for name, n in zip(names, row, strict=True)
        }
        for row in lengths
    ]


LENGTHS = [(5, 0, 1), (1, 2, 3), (16, 22, 22), (0, 9, 6), (7, 3, 14)]


def reference_tokens(example, config):
    """(id, segment, block, position, label) of every real token of an example, one after the other."""
    tokens = []
    for token in example["question_ids"]:
        tokens.append((token, 0, 0, len(tokens), -100))
    blocks_before = 0
    for segment, name in ((1, "plan"), (2, "execution")):
        content = example[f"{name}_ids"]
        size = getattr(config, f"{name}_block_size")
        rank = 0
        while rank < len(content) + 2 or rank % size:
            if rank == 0:
                token, label = getattr(config, f"{name}_token_id"), -100
            elif rank <= len(content):
                token = label = content[rank - 1]
            else:
                token = config.end_token_id
                label = token if rank == len(content) + 1 else -100
            tokens.append((token, segment, blocks_before + rank // size + 1, len(tokens), label))
            rank += 1
        blocks_before += rank // size
    return tokens


def reference_batch(examples, config, fixed_length):
    """The whole batch: real tokens in their columns, padding elsewhere."""
    rows = [reference_tokens(example, config) for example in examples]
    questions = config.question_len if fixed_length else max(len(example["question_ids"]) for example in examples)
    length = questions + (
        config.plan_len + config.execution_len
        if fixed_length
        else max(sum(token[1] > 0 for token in row) for row in rows)
    )
    batch = torch.tensor([[[config.pad_token_id, -1, -1, 0, -100]] * length] * len(rows))
    for row, tokens in enumerate(rows):
        first = {0: questions - sum(token[1] == 0 for token in tokens), 1: questions}
        for token in tokens:
            column = first.setdefault(token[1], questions + config.plan_len if fixed_length else first[1])
            batch[row, column] = torch.tensor(token)
            first[token[1]] += 1
    return dict(zip(KEYS, batch.unbind(dim=2), strict=True))


@pytest.mark.parametrize("fixed_length", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 8), (8, 3), (1, 1), (24, 24)])
@pytest.mark.parametrize("pad_token_id", [0, 1], ids=["pad", "pad is end"])
def test_batch_equals_token_by_token_reference(fixed_length, sizes, pad_token_id):
    config = make_config(
        block_size=None, plan_block_size=sizes[0], execution_block_size=sizes[1], pad_token_id=pad_token_id
    )
    examples = make_examples(LENGTHS)
    batch = HierarchicalDataCollator(config, fixed_length=fixed_length)(examples)
    expected = reference_batch(examples, config, fixed_length)
    assert tuple(batch) == KEYS
    for key in KEYS:
        assert batch[key].dtype == torch.long
        assert torch.equal(batch[key], expected[key]), key


def test_fixed_length_has_the_configured_shape(config):
    batch = HierarchicalDataCollator(config, fixed_length=True)(make_examples([(3, 2, 1)]))
    assert batch["input_ids"].shape == (1, config.question_len + config.plan_len + config.execution_len)


@pytest.mark.parametrize("block_sizes", [(4, 4), (8, 3)])
def test_fixed_and_dynamic_length_agree_on_real_tokens(block_sizes):
    config = make_config(block_size=None, plan_block_size=block_sizes[0], execution_block_size=block_sizes[1])
    examples = make_examples(LENGTHS)
    batches = [HierarchicalDataCollator(config, fixed_length=fixed)(examples) for fixed in (False, True)]
    for row in range(len(examples)):
        for key in KEYS:
            dynamic, fixed = (batch[key][row][batch["segment_ids"][row] >= 0] for batch in batches)
            assert torch.equal(dynamic, fixed), key


def test_row_is_laid_out_the_same_whatever_the_batch(config):
    examples = make_examples(LENGTHS)
    collator = HierarchicalDataCollator(config)
    together = collator(examples)
    for row, example in enumerate(examples):
        alone = collator([example])
        for key in KEYS:
            real = together["segment_ids"][row] >= 0
            assert torch.equal(alone[key][0], together[key][row][real]), key


def test_labels_count_content_and_one_end_per_segment(config):
    examples = make_examples(LENGTHS)
    labels = HierarchicalDataCollator(config)(examples)["labels"]
    expected = [plan + 1 + execution + 1 for _, plan, execution in LENGTHS]
    assert (labels != -100).sum(dim=1).tolist() == expected
    assert (labels == config.end_token_id).sum(dim=1).tolist() == [2] * len(LENGTHS)


def test_labels_are_the_input_where_they_count(config):
    batch = HierarchicalDataCollator(config)(make_examples(LENGTHS))
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])


def test_all_plans_start_in_one_column(config):
    batch = HierarchicalDataCollator(config)(make_examples(LENGTHS))
    is_opener = batch["input_ids"] == config.plan_token_id
    assert is_opener.sum(dim=1).tolist() == [1] * len(LENGTHS)
    assert is_opener.int().argmax(dim=1).unique().numel() == 1


def test_execution_blocks_go_on_after_the_rows_own_plan_blocks():
    config = make_config(block_size=None, plan_block_size=4, execution_block_size=3)
    batch = HierarchicalDataCollator(config)(make_examples([(2, 1, 1), (2, 7, 4)]))
    blocks = [row[row > 0].tolist() for row in batch["block_ids"]]
    assert blocks == [[1] * 4 + [2] * 3, [1] * 4 + [2] * 4 + [3] * 4 + [4] * 3 + [5] * 3]


def test_empty_plan_is_opener_and_end(config):
    batch = HierarchicalDataCollator(config)(make_examples([(2, 0, 3)]))
    plan = batch["input_ids"][0][batch["segment_ids"][0] == 1]
    assert plan.tolist() == [config.plan_token_id] + [config.end_token_id] * 3
    assert batch["labels"][0][batch["segment_ids"][0] == 1].tolist() == [-100, config.end_token_id, -100, -100]


@pytest.mark.parametrize("fixed_length", [False, True])
def test_example_at_its_limits_passes(config, fixed_length):
    at_limits = make_examples([(config.question_len, config.plan_len - 2, config.execution_len - 2)])
    assert over_long_segments(at_limits[0], config) == []
    batch = HierarchicalDataCollator(config, fixed_length=fixed_length)(at_limits)
    assert (batch["segment_ids"] >= 0).all()


@pytest.mark.parametrize(
    ("segment", "lengths"), [("question", (17, 3, 3)), ("plan", (3, 23, 3)), ("execution", (3, 3, 23))]
)
def test_one_token_over_a_limit_raises(config, segment, lengths):
    example = make_examples([lengths])[0]
    limit = getattr(config, f"{segment}_len")
    assert over_long_segments(example, config) == [segment]
    assert segment_lengths(example, config)[segment] == limit + 1
    with pytest.raises(ValueError, match=rf"`{segment}` .*{segment}_len={limit} .*got {limit + 1}"):
        HierarchicalDataCollator(config)([example])


@pytest.mark.parametrize("role", ["mask", "plan", "execution", "end", "pad"])
@pytest.mark.parametrize("segment", ["question", "plan", "execution"])
def test_special_token_in_content_raises(config, role, segment):
    example = make_examples([(3, 3, 3)])[0]
    example[f"{segment}_ids"][1] = getattr(config, f"{role}_token_id")
    if (segment, role) == ("question", "pad"):  # the BOS token of some tokenizers is their pad token
        HierarchicalDataCollator(config)([example])
        return
    with pytest.raises(ValueError, match=rf"`{segment}_ids` .* {role} "):
        HierarchicalDataCollator(config)([example])


def test_pad_in_a_question_raises_where_pad_is_end():
    config = make_config(pad_token_id=1)
    with pytest.raises(ValueError, match=r"`question_ids` .* end \(1\)"):
        HierarchicalDataCollator(config)([{"question_ids": [1, 7], "plan_ids": [7], "execution_ids": [7]}])


def test_example_length_is_what_the_collator_lays_out(config):
    examples = make_examples(LENGTHS)
    batch = HierarchicalDataCollator(config)(examples)
    expected = (batch["segment_ids"] >= 0).sum(dim=1).tolist()
    assert [example_length(example, config) for example in examples] == expected


def test_ids_may_be_tensors(config):
    examples = make_examples(LENGTHS)
    tensors = [{key: torch.tensor(ids, dtype=torch.long) for key, ids in example.items()} for example in examples]
    collator = HierarchicalDataCollator(config)
    assert torch.equal(collator(tensors)["input_ids"], collator(examples)["input_ids"])


def test_columns_besides_ids_are_left_alone(config):
    examples = [example | {"answer": "18", "length": 3, "question": "?"} for example in make_examples(LENGTHS)]
    assert tuple(HierarchicalDataCollator(config)(examples)) == KEYS


TEXTS = {"question": "2 + 3?", "plan": "Add.", "execution": "5\n#### 5"}


def test_texts_give_the_batch_of_their_ids():
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer)
    ids = {f"{key}_ids": tokenizer(text)["input_ids"] for key, text in TEXTS.items()}
    from_texts = HierarchicalDataCollator(config, tokenizer)([TEXTS])
    from_ids = HierarchicalDataCollator(config)([ids])
    assert all(torch.equal(from_texts[key], from_ids[key]) for key in KEYS)


def test_only_the_question_gets_a_bos_token():
    tokenizer = make_tokenizer(adds_bos=True)
    encoded = encode_example(TEXTS, tokenizer)
    assert encoded["question_ids"][0] == tokenizer.bos_token_id
    for segment, text in TEXTS.items():
        assert tokenizer.decode(encoded[f"{segment}_ids"], skip_special_tokens=True) == text
        assert encoded[f"{segment}_ids"].count(tokenizer.bos_token_id) == (segment == "question")


@pytest.mark.parametrize("plan", ["", None])
def test_plan_text_may_be_empty(plan):
    assert encode_example(TEXTS | {"plan": plan}, make_tokenizer())["plan_ids"] == []


@pytest.mark.parametrize(("segment", "value"), [("execution", None), ("question", 3), ("plan", ["Add."])])
def test_value_that_is_no_text_raises(segment, value):
    with pytest.raises(ValueError, match=f"`{segment}` must be a string"):
        encode_example(TEXTS | {segment: value}, make_tokenizer())


def test_missing_key_is_named():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="lacks plan, execution among question, answer"):
        HierarchicalDataCollator(make_config_for(tokenizer), tokenizer)([{"question": "2 + 3?", "answer": "5"}])


def test_texts_without_tokenizer_raise(config):
    with pytest.raises(ValueError, match=r"must have the keys question_ids, plan_ids, execution_ids.* no `tokenizer`"):
        HierarchicalDataCollator(config)([TEXTS])


def test_special_token_written_in_a_text_raises():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"`execution_ids` .* end \("):
        HierarchicalDataCollator(make_config_for(tokenizer), tokenizer)([TEXTS | {"execution": "5<|end|>"}])


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("length", range(12))
def test_auto_split_loses_no_token(length, adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    text = "abcdefghijkl"[:length]
    parts = encode_example({"text": text}, tokenizer, auto_split=True)
    assert [token for ids in parts.values() for token in ids] == tokenizer(text)["input_ids"]
    n = length + adds_bos
    assert [len(ids) for ids in parts.values()] == [n // 4, n // 4, n - 2 * (n // 4)]


def test_auto_split_makes_a_batch():
    tokenizer = make_tokenizer()
    config = make_config_for(tokenizer)
    batch = HierarchicalDataCollator(config, tokenizer, auto_split=True)([{"text": "abcdefgh"}])
    content = (batch["labels"] != -100) & (batch["labels"] != config.end_token_id)
    assert [(content & (batch["segment_ids"] == segment)).sum().item() for segment in (1, 2)] == [2, 4]


def test_text_alone_raises_and_says_how_to_split_it():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"lacks question, plan, execution .*`auto_split=True`"):
        HierarchicalDataCollator(make_config_for(tokenizer), tokenizer)([{"text": "abcdefgh"}])


def test_auto_split_leaves_an_example_with_segments_alone():
    tokenizer = make_tokenizer()
    assert encode_example(TEXTS | {"text": "x"}, tokenizer, auto_split=True) == encode_example(TEXTS, tokenizer)


def test_questions_are_left_padded():
    batch = collate_questions([[7, 8], [9], [5, 6, 7]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[0, 7, 8], [0, 0, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert {ids.dtype for ids in batch.values()} == {torch.long}


def test_questions_stand_as_in_the_training_batch(config):
    examples = make_examples(LENGTHS)
    questions = collate_questions([example["question_ids"] for example in examples], config.pad_token_id)
    batch = HierarchicalDataCollator(config)(examples)
    width = questions["input_ids"].shape[1]
    assert torch.equal(questions["input_ids"], batch["input_ids"][:, :width])
    assert torch.equal(questions["attention_mask"], (batch["segment_ids"][:, :width] == 0).long())


def test_collator_travels_to_data_loader_workers():
    tokenizer = make_tokenizer()
    collator = HierarchicalDataCollator(make_config_for(tokenizer), tokenizer)
    copy = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copy([TEXTS])["input_ids"], collator([TEXTS])["input_ids"])
