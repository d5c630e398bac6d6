"""A partial order over blocks is a change in the order alone: mask, leaks and generation of a tree of five blocks.

The plan is the root; two blocks of the execution depend on it, and one more on each of these two. Blocks of different
branches do not see each other, and are denoised at the same time.
"""

import math

import pytest
import torch

from hierbd3lm.masking_hierbd3lm import CLEAN, EXECUTION, NOISY, PLAN, QUESTION, TokenLayout, dense_mask
from hierbd3lm.order_hierbd3lm import BlockOrder, Part

from .tiny import TINY_TOKEN_IDS, make_model

SIZE, QUESTION_LEN, NUM_BLOCKS = 4, 3, 5
PARENT = {1: None, 2: 1, 3: 1, 4: 2, 5: 3}  # of each block; the question, block 0, is seen by all
WAVES = [[1], [2, 3], [4, 5]]  # denoised at the same time
PAD, END, PLAN_ID, EXECUTION_ID, MASK = 0, 1, 2, 3, 4


def ancestors(block):
    return set() if not block else {0} if PARENT[block] is None else {PARENT[block]} | ancestors(PARENT[block])


def make_tree():
    openers = [PLAN_ID, EXECUTION_ID, None, None, None]
    after = [(), (0,), (0,), (1,), (2,)]
    segments = [(PLAN,)] + [(EXECUTION,)] * 4
    parts = (Part(*fields) for fields in zip(segments, [SIZE] * 5, [SIZE] * 5, openers, after, strict=True))
    return BlockOrder(tuple(parts), **TINY_TOKEN_IDS)


@pytest.fixture(scope="module")
def tree_model():
    torch.manual_seed(1)
    model = make_model(plan_len=SIZE, execution_len=4 * SIZE, block_size=SIZE)
    model.order = make_tree()
    return model


def block_of(column):
    return 0 if column < QUESTION_LEN else 1 + (column - QUESTION_LEN) // SIZE


def one_row():
    segment_ids = torch.tensor([[QUESTION] * QUESTION_LEN + [PLAN] * SIZE + [EXECUTION] * 4 * SIZE])
    generator = torch.Generator().manual_seed(0)
    x0, xt = torch.randint(5, 40, (2, *segment_ids.shape), generator=generator)
    return x0, xt, segment_ids


def test_blocks_and_positions_are_numbered_along_the_sequence():
    _, _, segment_ids = one_row()
    block_ids, position_ids = make_tree().layout(segment_ids)
    assert block_ids[0].tolist() == [block_of(column) for column in range(segment_ids.shape[1])]
    assert position_ids[0].tolist() == list(range(segment_ids.shape[1]))


def test_mask_is_that_of_the_ancestors():
    order, (_, _, segment_ids) = make_tree(), one_row()
    block_ids, position_ids = order.layout(segment_ids)
    clean = TokenLayout(block_ids, torch.full_like(block_ids, CLEAN), position_ids)
    both = clean + clean.in_stream(NOISY)
    mask = dense_mask(both, both, precedes=order.precedes)[0, 0]
    length = segment_ids.shape[1]
    for query in range(2 * length):
        for key in range(2 * length):
            q_block, k_block = block_of(query % length), block_of(key % length)
            sees_itself = q_block == k_block and query // length == key // length
            assert mask[query, key] == (sees_itself or (key < length and k_block in ancestors(q_block)))


def test_gradients_reach_ancestors_and_the_own_noisy_block_alone(tree_model):
    x0, xt, segment_ids = one_row()
    embedded = []
    handle = tree_model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = tree_model(input_ids=x0, noisy_input_ids=xt, segment_ids=segment_ids).logits[0]
    handle.remove()
    length = segment_ids.shape[1]
    for column in range(QUESTION_LEN, length):
        (gradient,) = torch.autograd.grad(logits[column].sum(), embedded[0], retain_graph=True)
        moved = (gradient[0] != 0).any(dim=-1)
        for other in range(length):
            assert moved[other] == (block_of(other) in ancestors(block_of(column)))
            assert moved[length + other] == (block_of(other) == block_of(column))


def denoise_slowly(model, question):
    """Tokens of the five blocks, left to right; a pass reveals one in every block whose parent is finished.

    Every token is recomputed in each pass.
    """
    blocks, num_passes = {}, 0
    while len(blocks) < NUM_BLOCKS or any(MASK in tokens for tokens in blocks.values()):
        finished = {None, *(block for block, tokens in blocks.items() if MASK not in tokens)}
        for block, parent in PARENT.items():
            if parent in finished and block not in blocks:
                blocks[block] = [MASK] * SIZE
                blocks[block][0] = {1: PLAN_ID, 2: EXECUTION_ID}.get(block, MASK)
        before, num_passes = {block: list(tokens) for block, tokens in blocks.items()}, num_passes + 1
        for block, tokens in before.items():
            if MASK in tokens:
                place = tokens.index(MASK)
                blocks[block][place] = greedy_token(model, question, before, block, place)
                if blocks[block][place] == END:
                    blocks[block][place:] = [END] * (SIZE - place)
    return [token for block in range(1, NUM_BLOCKS + 1) for token in blocks[block]], num_passes


def greedy_token(model, question, blocks, block, place):
    tokens, ids = list(question), [0] * len(question)
    positions = list(range(len(question)))
    for number, its in sorted(blocks.items()):
        tokens, ids = tokens + its, ids + [number] * SIZE
        start = len(question) + (number - 1) * SIZE
        positions += range(start, start + SIZE)
    sees = [[k == q or k in ancestors(q) for k in ids] for q in ids]
    with torch.no_grad():
        logits = model.backbone(
            torch.tensor([tokens]),
            attention_mask=torch.tensor([[sees]]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
        ).logits[0]
    column = next(index for index, number in enumerate(ids) if number == block) + place
    logits[column, [MASK, PLAN_ID, EXECUTION_ID, PAD]] = -math.inf
    return int(logits[column].argmax())


QUESTIONS = [[7, 8, 9], [11, 5, 6, 7, 30], [20], [33, 34, 12, 9, 9, 13]]


def test_generation_equals_the_slow_reference_in_a_ragged_batch(tree_model):
    widest = max(map(len, QUESTIONS))
    padded = torch.tensor([[PAD] * (widest - len(question)) + question for question in QUESTIONS])
    output = tree_model.generate(padded, sampler="first_hitting")
    for row, question in enumerate(QUESTIONS):
        tokens, num_passes = denoise_slowly(tree_model, question)
        assert output.sequences[row, widest:].tolist() == tokens
        assert output.num_forward_passes[row] == num_passes


def test_branches_share_their_forward_passes(tree_model):
    output = tree_model.generate(torch.tensor(QUESTIONS[:1]), sampler="confidence", tokens_per_step=SIZE)
    assert output.num_forward_passes.tolist() == [len(WAVES)]
