"""The block cache holds each finished block once, and nothing else."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hierbd3lm.cache_hierbd3lm import LEAST_GROWTH, BlockCache, grouped_attention

from .tiny import make_model
from .tiny_backbones import make_backbone_config
from .tiny_generation import END, RAGGED_QUESTIONS, left_pad, speaker

# The cache


@pytest.mark.parametrize("sampler", ["first_hitting", "confidence"])
def test_a_pass_leaves_no_trace_in_finished_blocks(sampler):
    model, snapshots, storages = speaker(), [], set()

    def finished_blocks(cache):
        return [
            states[: cache.num_rows, :, cache.scratch :].clone()
            for layer in cache.layers
            if layer.is_initialized
            for states in (layer.keys, layer.values)
        ]

    encode = model.encode

    def watched(tokens, layout, cache, *args):
        old = finished_blocks(cache)
        states = encode(tokens, layout, cache, *args)
        assert all(torch.equal(a, b) for a, b in zip(old, finished_blocks(cache), strict=bool(old)))
        snapshots.append(old)
        storages.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
        return states

    with mock.patch.object(model, "encode", watched):
        model.generate(left_pad(RAGGED_QUESTIONS), sampler=sampler)
    assert len(snapshots) > 5
    assert len(storages) <= 2  # moved once at most


@pytest.mark.slow
def test_memory_grows_with_what_is_used():
    """64 rows of up to 8,000 tokens whose answers are short take the memory of short answers."""
    limits = {"question_len": 256, "plan_len": 4000, "execution_len": 4000}
    backbone = make_backbone_config("qwen3", max_position_embeddings=8256)
    model, rooms = make_model(**limits, block_size=4, backbone_config=backbone), []
    torch.manual_seed(0)
    model.backbone.lm_head.weight.data[END] = 0.3 * model.backbone.lm_head.weight.data.sum(dim=0)
    encode = model.encode

    def watched(tokens, layout, cache, *args):
        states = encode(tokens, layout, cache, *args)
        rooms.append((cache.layers[0].keys.shape[2] - cache.scratch, cache.used))
        return states

    questions = torch.randint(5, 40, (64, 20))
    with mock.patch.object(model, "encode", watched):
        limited = model.generate(questions, max_new_tokens=400)
    assert max(used for _, used in rooms) > 10 * LEAST_GROWTH
    first_pass = 20 + 4  # question and block
    for room, used in rooms:
        needed = max(used, first_pass)
        assert room <= max(1.25 * needed, needed + LEAST_GROWTH) + 8
    assert len({room for room, _ in rooms}) <= 10  # moved a few times
    alone = model.generate(questions[:1], max_new_tokens=400)
    assert limited.sequences[0, : alone.sequences.shape[1]].tolist() == alone.sequences[0].tolist()


@pytest.mark.parametrize("length", [1, 5, 70])
def test_grouped_attention_is_attention_over_repeated_keys(length):
    torch.manual_seed(0)
    query = torch.randn(2, 6, length, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 90, 4, dtype=torch.float64)
    mask = torch.rand(2, 1, length, 90) < 0.5
    mask[..., 0] = True
    scores = torch.einsum("rhqd,rhkd->rhqk", query, key.repeat_interleave(3, dim=1)) * 0.3
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("rhqk,rhkd->rqhd", weights, value.repeat_interleave(3, dim=1))
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    states, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(states, expected)


def test_a_denoising_pass_reads_cached_keys_once_for_all_heads_of_a_group():
    model, heads = speaker(), []  # 4 heads, 2 of keys
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        heads.append((query.shape[1], key.shape[1]))
        return attend(query, key, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watched):
        model.generate(left_pad(RAGGED_QUESTIONS))
    assert set(heads) == {(2, 2)}
    assert model.backbone.config._attn_implementation == "sdpa"


class ListCache:
    """What a `BlockCache` holds, as a list of (key, block, position) for each row."""

    def __init__(self, num_rows):
        self.rows = [[] for _ in range(num_rows)]

    def commit(self, keys, block_ids, position_ids):
        for row, column in itertools.product(range(len(self.rows)), range(block_ids.shape[1])):
            if block_ids[row, column] >= 0:
                entry = (float(keys[row, 0, column, 0]), int(block_ids[row, column]), int(position_ids[row, column]))
                self.rows[row].append(entry)

    def check(self, cache, returned, pass_length):
        """Compares a `BlockCache` and the keys that its `update` has returned."""
        layout = cache.layout
        assert layout.block_ids.shape == (len(self.rows), max((len(row) for row in self.rows), default=0))
        for number, row in enumerate(self.rows):
            width = len(row)
            assert [key for key, _, _ in row] == returned[number, 0, pass_length : pass_length + width, 0].tolist()
            assert [block for _, block, _ in row] == layout.block_ids[number, :width].tolist()
            assert [position for _, _, position in row] == layout.position_ids[number, :width].tolist()
            assert (layout.block_ids[number, width:] == -1).all()


@pytest.mark.parametrize("num_rows", [6, 1])
def test_block_cache_equals_lists(num_rows):
    generator = torch.Generator().manual_seed(0)
    cache = BlockCache(num_layers=2, num_rows=num_rows, scratch=9, capacity=40, device=torch.device("cpu"))
    leaving = {2: [0, 1, 1, 0, 1, 1], 5: [1, 0, 1, 0]} if num_rows > 1 else {}
    expected = [ListCache(num_rows), ListCache(num_rows)]
    for step in range(8):
        pass_length = int(torch.randint(4, 10, (), generator=generator))
        num_clean = 0 if step == 3 else pass_length - 3
        keys = torch.randn(2, num_rows, 2, pass_length, 4, generator=generator)
        for index, layer in enumerate(cache.layers):
            returned, returned_values = cache.update(keys[index], -keys[index], index)
            assert torch.equal(returned[:, :, :pass_length], keys[index])
            assert torch.equal(returned_values, -returned)
            # Views: no finished block is copied for a pass.
            assert returned.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
            assert returned_values.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
        least = -1 if num_rows > 1 or step % 2 else 0  # a single row without padding has a way of its own
        block_ids = torch.randint(least, 3, (num_rows, num_clean), generator=generator)
        position_ids = torch.randint(0, 50, (num_rows, num_clean), generator=generator)
        if num_clean:
            cache.commit(block_ids, position_ids, pass_length)
        for index, lists in enumerate(expected):
            lists.commit(keys[index], block_ids, position_ids)
            probe, _ = cache.layers[index].update(keys[index], -keys[index])
            if step not in leaving:
                lists.check(cache, probe, pass_length)
        if step in leaving:
            keep = torch.tensor(leaving[step]) > 0
            addresses = [layer.keys.data_ptr() for layer in cache.layers]
            order = cache.keep_rows(keep).tolist()
            assert sorted(order) == keep.nonzero()[:, 0].tolist()
            num_rows = len(order)
            for lists in expected:
                lists.rows = [lists.rows[old] for old in order]
            assert addresses == [layer.keys.data_ptr() for layer in cache.layers]


def test_dropping_rows_moves_no_more_than_the_holes():
    cache = BlockCache(num_layers=1, num_rows=6, scratch=2, capacity=4, device=torch.device("cpu"))
    cache.update(torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 1), torch.zeros(6, 1, 2, 1), 0)
    for keep, expected in (
        ([True, False, True, True, True, True], [0, 5, 2, 3, 4]),
        ([True, True, True, True, False], [0, 1, 2, 3]),
        ([False, False, False, True], [3]),
        ([False], []),
    ):
        rows_before = cache.layers[0].keys[:, 0, 0, 0].clone()
        order = cache.keep_rows(torch.tensor(keep)).tolist()
        assert order == expected
        rows = cache.layers[0].keys[:, 0, 0, 0]
        assert rows[: len(order)].tolist() == rows_before[order].tolist()
        assert cache.num_rows == len(order) == len(cache.lengths)


def test_a_row_that_stays_has_its_whole_capacity():
    cache = BlockCache(num_layers=1, num_rows=2, scratch=6, capacity=8, device=torch.device("cpu"))

    def keep(block_ids):
        keys = torch.randn(*block_ids.shape, 1)[:, None]
        cache.update(keys, keys, 0)
        cache.commit(block_ids, torch.arange(block_ids.shape[1]).expand_as(block_ids), block_ids.shape[1])

    keep(torch.tensor([[0] * 6, [-1] * 4 + [0] * 2]))
    cache.keep_rows(torch.tensor([False, True]))
    assert cache.layout.block_ids.tolist() == [[0, 0]]
    keep(torch.ones(1, 6, dtype=torch.long))
    assert cache.layout.block_ids.tolist() == [[0] * 2 + [1] * 6]


def test_what_uninitialised_memory_holds_reaches_no_answer(monkeypatch):
    # A masked column is multiplied by 0, which leaves a NaN a NaN.
    expected = speaker().generate(left_pad(RAGGED_QUESTIONS))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    output = speaker().generate(left_pad(RAGGED_QUESTIONS))
    assert torch.equal(output.sequences, expected.sequences)
