"""`execution_order="plan"`: every step sees question, plan and its ancestors alone, in training and in generation."""

import functools
import itertools
import random
from unittest import mock

import pytest
import torch

from hierbd3lm.data.collator import HierarchicalDataCollator
from hierbd3lm.evaluation.likelihood import measure_batch, with_predicted_tokens
from hierbd3lm.masking_hierbd3lm import NOISY
from hierbd3lm.order_hierbd3lm import BlockOrder, total_order
from hierbd3lm.training.objectives import make_objective

from .reference_graph import SlowGraph, ancestors, generate, nelbo
from .tiny import FIRST_CONTENT_ID, make_config
from .tiny_generation import END, EXECUTION, MASK, PLAN, speaker

STEP_LEN, MOST_STEPS = 8, 5
FIELDS = {"execution_order": "plan", "step_len": STEP_LEN, "execution_len": (MOST_STEPS + 1) * STEP_LEN}
FIELDS |= {"plan_len": 8, "end_bias": 2.0}
SHIFTED = {"prediction": "shifted", "question_attention": "causal"}
KINDS = {
    "in place, 4": {"plan_block_size": 4, "execution_block_size": 4},
    "in place, 2 and 4": {"plan_block_size": 2, "execution_block_size": 4},
    "in place, 1": {"plan_block_size": 1, "execution_block_size": 1},
    "shifted, 4": {"plan_block_size": 4, "execution_block_size": 4, **SHIFTED},
    "shifted, 4 and 2": {"plan_block_size": 4, "execution_block_size": 2, **SHIFTED},
    "shifted, 1": {"plan_block_size": 1, "execution_block_size": 1, **SHIFTED},
}
QUESTIONS = [[7, 8, 9], [20], [10, 11, 12, 13, 14], [33, 34, 12, 9], [5, 6]]


def model_of(kind, **fields):
    return speaker(**(FIELDS | KINDS[kind] | fields))


def random_graph(rng, num_steps):
    return [sorted(rng.sample(range(step), rng.randint(0, min(step, 2)))) for step in range(num_steps)]


def random_example(rng, num_steps, config):
    """Ids of an example; each step has one to six tokens, so that steps have one or two blocks of four."""

    def content(length):
        return [rng.randint(FIRST_CONTENT_ID, config.vocab_size - 1) for _ in range(length)]

    lengths = [rng.randint(1, STEP_LEN - 2) for _ in range(num_steps + 1)]
    example = {"question_ids": content(3), "plan_ids": content(4), "execution_ids": content(sum(lengths))}
    return example | {"step_lengths": lengths, "depends_on": random_graph(rng, num_steps)}


def parts_of(example, config):
    """Tokens of the plan, of each step and of the answer, as they are laid out."""
    contents, start = [example["plan_ids"]], 0
    for length in example["step_lengths"]:
        contents.append(example["execution_ids"][start : start + length])
        start += length
    parts = []
    for number, content in enumerate(contents):
        size = config.execution_block_size if number else config.plan_block_size
        tokens = [config.execution_token_id if number else config.plan_token_id, *content, config.end_token_id]
        parts.append(tokens + [config.end_token_id] * (-len(tokens) % size))
    return parts


def slow_row(model, example):
    row = SlowGraph(model, example["question_ids"], example["depends_on"])
    for part, tokens in enumerate(parts_of(example, model.config)):
        row.append(part, tokens)
    return row


# Training


@pytest.mark.parametrize("kind", ["in place, 2 and 4", "shifted, 1"])
def test_examples_are_laid_out_in_parts_at_fixed_distances_from_the_plan(kind):
    model, rng = model_of(kind), random.Random(0)
    examples = [random_example(rng, num_steps, model.config) for num_steps in (0, 1, 3, MOST_STEPS)]
    batch = HierarchicalDataCollator(model.config)(examples)
    for place, example in enumerate(examples):
        row = slow_row(model, example)
        is_real = batch["segment_ids"][place] >= 0
        assert batch["input_ids"][place, is_real].tolist() == [token.token for token in row.tokens]
        assert batch["position_ids"][place, is_real].tolist() == [token.position for token in row.tokens]
        same_block = batch["block_ids"][place, is_real][1:] == batch["block_ids"][place, is_real][:-1]
        blocks = [(token.part, token.block) for token in row.tokens]
        if model.config.question_attention == "bidirectional":
            assert same_block.tolist() == [a == b for a, b in itertools.pairwise(blocks)]
        counted = [*example["plan_ids"], END]
        for tokens in parts_of(example, model.config)[1:]:
            counted += tokens[1 : tokens.index(END) + 1]
        labels = batch["labels"][place]
        assert labels[labels != -100].tolist() == counted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["in place, 4", "shifted, 4 and 2"])
def test_a_step_s_logits_never_move_with_a_token_of_another_step_that_is_no_ancestor(kind, seed):
    """By gradient, on random graphs: exactly what the loop over pairs allows."""
    model, rng = model_of(kind), random.Random(seed)
    example = random_example(rng, rng.randint(2, MOST_STEPS), model.config)
    row = slow_row(model, example)
    batch = HierarchicalDataCollator(model.config)([example])
    length, num_question = batch["input_ids"].shape[1], len(example["question_ids"])
    xt = torch.randint(FIRST_CONTENT_ID, 40, (1, length), generator=torch.Generator().manual_seed(seed))
    embedded, layout = [], {name: batch[name] for name in ("block_ids", "position_ids", "sees")}
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = model(input_ids=batch["input_ids"], noisy_input_ids=xt, **layout).logits[0]
    handle.remove()
    shift = model.config.prediction == "shifted"
    for column in range(num_question, length):
        token = row.tokens[column]
        opens = (token.part, token.block) != (row.tokens[column - 1].part, row.tokens[column - 1].block)
        (gradient,) = torch.autograd.grad(logits[column].sum(), embedded[0], retain_graph=True)
        moved = (gradient[0] != 0).any(dim=-1).tolist()
        from_clean = shift and opens
        reader = row.tokens[column - 1] if from_clean else token  # the token whose state predicts this one
        for other, key in enumerate(row.tokens):
            is_own = (key.part, key.block) == (reader.part, reader.block)
            assert moved[other] == (row.sees(reader, key) and (from_clean or not is_own)), (column, other)
            assert moved[length + other] == (is_own and not from_clean), (column, other)


@pytest.mark.parametrize("kind", ["in place, 2 and 4", "in place, 1", "shifted, 4 and 2", "shifted, 1"])
def test_the_exact_bound_is_that_of_every_mask_of_every_block(kind):
    model, rng = model_of(kind), random.Random(4)
    examples = [random_example(rng, num_steps, model.config) for num_steps in (2, 3)]
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(examples))
    measured = measure_batch(make_objective(model.config), model, batch, num_draws=1, exact=True)
    for place, example in enumerate(examples):
        row, parts = slow_row(model, example), parts_of(example, model.config)
        nats = [nelbo(row, part, tokens) for part, tokens in enumerate(parts)]
        assert measured[place, 0].tolist() == pytest.approx(
            [nats[0], sum(nats[1:])], rel=1e-6
        )  # losses are in float32
        num_counted = [len(example["plan_ids"]) + 1, len(example["execution_ids"]) + len(parts) - 1]
        assert measured[place, 1].tolist() == num_counted


def test_the_estimate_of_the_bound_has_the_exact_one_as_its_mean():
    model = model_of("in place, 2 and 4")
    example = random_example(random.Random(5), 3, model.config)
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)([example] * 40))
    objective, generator = make_objective(model.config), torch.Generator().manual_seed(0)
    exact = objective.exact(model, {name: ids[:1] for name, ids in batch.items()}).sum()
    with torch.no_grad():
        draws = torch.cat([objective.token_nelbo(model, batch, generator).sum(dim=1) for _ in range(10)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5


@pytest.mark.parametrize("attn", ["sdpa", "flex_attention"])
def test_packed_examples_keep_the_graphs_of_their_own(attn):
    model, rng = model_of("shifted, 4 and 2", attn=attn), random.Random(6)
    examples = [random_example(rng, num_steps, model.config) for num_steps in (2, 4, 1, 5)]
    batch = with_predicted_tokens(model, HierarchicalDataCollator(model.config)(examples))
    packed = batch | {"row_ids": torch.tensor([1, 0, 1, 0])}
    objective, losses = make_objective(model.config), []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for inputs in (batch, packed):
            losses.append(objective.token_nelbo(model, inputs, torch.Generator().manual_seed(0)))
    assert torch.allclose(*losses, atol=1e-5) and losses[0].abs().sum() > 0


# Generation


class Digits:
    """Stands for a tokenizer: the text of ids is their numbers."""

    @staticmethod
    def decode(ids, **kwargs):
        return " ".join(map(str, ids))


def parse_at_random(text):
    """A graph that depends on nothing but the plan."""
    rng = random.Random(text)
    return random_graph(rng, rng.randint(1, MOST_STEPS))


def generate_quickly(model, questions, parser=parse_at_random, **settings):
    widest = max(map(len, questions))
    padded = torch.tensor([[0] * (widest - len(question)) + question for question in questions])
    return model.generate(padded, tokenizer=Digits, plan_parser=parser, **settings), widest


@functools.cache
def written_slowly(kind, place, threshold):
    return generate(
        model_of(kind), QUESTIONS[place], lambda ids: parse_at_random(Digits.decode(ids)), threshold=threshold
    )


@pytest.mark.parametrize("threshold", [None, 0.35])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_slow_reference(kind, threshold):
    """Also in one batch, whose rows have different graphs, as row by row."""
    model, graphs = model_of(kind), set()
    settings = {"sampler": "first_hitting"} if threshold is None else {"sampler": "confidence", "threshold": threshold}
    together, widest = generate_quickly(model, QUESTIONS, **settings)
    for place, question in enumerate(QUESTIONS):
        expected = written_slowly(kind, place, threshold)
        graphs.add(str(len(expected.parts)))
        alone, _ = generate_quickly(model, [question], **settings)
        for output, row, left in ((together, place, widest), (alone, 0, len(question))):
            answer = [token for token in output.sequences[row, left:].tolist() if token]
            assert answer == [*itertools.chain(*expected.parts)]
            assert output.num_forward_passes[row] == expected.num_forward_passes
            assert output.finished[row] == expected.finished and output.plan_followed[row]
            contents = [part[1 : part.index(END)] if END in part else part[1:] for part in expected.parts]
            assert [token for token in output.plan[row].tolist() if token] == contents[0]
            assert [token for token in output.execution[row].tolist() if token] == [*itertools.chain(*contents[1:])]
    assert len(graphs) > 1


@pytest.mark.parametrize("kind", ["in place, 4", "shifted, 4 and 2", "in place, 1"])
def test_a_pass_of_generation_sees_what_the_training_pass_sees(kind):
    """The logits of every pass are those of the training pass over the finished answer."""
    model, passes, encode = model_of(kind), [], model_of(kind).encode

    def record(tokens, layout, *args):
        states = encode(tokens, layout, *args)
        passes.append((tokens[0], layout, model.project(states)[0]))
        return states

    with mock.patch.object(model, "encode", record):
        output, _ = generate_quickly(model, QUESTIONS[:1], sampler="first_hitting")
    tokens = output.sequences
    in_execution = (tokens == EXECUTION).cumsum(dim=1) > 0
    segment_ids = ((tokens == PLAN).cumsum(dim=1) > 0).long() + in_execution.long()
    block_ids, position_ids = model.order.layout(segment_ids, tokens)
    content = [token for token in output.plan[0].tolist() if token]
    sees = model.order.see_steps(parse_at_random(Digits.decode(content)))[None]
    column_of = {position: column for column, position in enumerate(position_ids[0].tolist())}
    num_parallel = 0
    for canvas, layout, logits in passes:
        is_noisy = (layout.stream_ids[0] == NOISY) & (layout.block_ids[0] > 0)
        columns = [column_of[position] for position in layout.position_ids[0, is_noisy].tolist()]
        xt = tokens.clone()
        xt[0, columns] = canvas[is_noisy]
        with torch.no_grad():
            trained = model(
                input_ids=tokens,
                noisy_input_ids=xt,
                block_ids=block_ids,
                position_ids=position_ids,
                sees=sees,
            ).logits[0]
        shift = model.config.prediction == "shifted"
        for column, own in zip(columns, logits[is_noisy], strict=True):
            if not shift:
                assert torch.allclose(own, trained[column], atol=1e-9)
            elif column + 1 in columns and block_ids[0, column] == block_ids[0, column + 1]:
                assert torch.allclose(own, trained[column + 1], atol=1e-9)
        num_parallel += len(set(block_ids[0, columns].tolist())) > 1
    assert num_parallel > 0


def test_independent_steps_share_their_passes():
    model = model_of("in place, 4")
    (wide, _), (narrow, _) = (
        generate_quickly(model, QUESTIONS[:1], parser=lambda text, graph=graph: graph, sampler="first_hitting")
        for graph in ([[]] * MOST_STEPS, total_order(MOST_STEPS))
    )
    assert wide.num_forward_passes < narrow.num_forward_passes


def test_a_plan_that_cannot_be_parsed_gets_the_total_order_and_is_reported():
    model = model_of("in place, 2 and 4")

    def fail(text):
        raise ValueError("no plan")

    for parser in (lambda text: None, fail, lambda text: [[]] * (MOST_STEPS + 1)):
        output, _ = generate_quickly(model, QUESTIONS, parser=parser)
        assert output.plan_followed.tolist() == [False] * len(QUESTIONS)
        in_order, _ = generate_quickly(model, QUESTIONS, parser=lambda text: total_order(1))  # `Digits` has one line
        assert in_order.plan_followed.all() and torch.equal(output.sequences, in_order.sequences)
    mixed, _ = generate_quickly(model, QUESTIONS, parser=lambda text: parse_at_random(text) if len(text) % 2 else None)
    lengths = [len(Digits.decode([token for token in row.tolist() if token])) for row in mixed.plan]
    assert mixed.plan_followed.tolist() == [length % 2 == 1 for length in lengths]


def test_a_parser_that_returns_no_graph_is_refused():
    with pytest.raises(ValueError, match=r"`depends_on` must hold numbers of earlier steps.* but step 1 has \[1\]"):
        generate_quickly(model_of("in place, 4"), QUESTIONS, parser=lambda text: [[], [1]])


def test_a_given_plan_is_followed_and_a_plan_alone_needs_no_parser():
    model = model_of("in place, 2 and 4")
    whole, _ = generate_quickly(model, QUESTIONS[:1], sampler="first_hitting")
    question = torch.tensor(QUESTIONS[:1])
    plan = model.generate(question, stage="plan", sampler="first_hitting")
    assert torch.equal(plan.plan, whole.plan) and not plan.execution.numel()
    settings = {"stage": "execution", "sampler": "first_hitting", "tokenizer": Digits, "plan_parser": parse_at_random}
    given = model.generate(question, plan_ids=plan.plan, **settings)
    assert torch.equal(given.sequences, whole.sequences)
    assert given.num_forward_passes == whole.num_forward_passes - plan.num_forward_passes


def test_another_block_size_is_possible_and_flex_attention_reads_the_same_table():
    model = model_of("in place, 4")
    smaller, _ = generate_quickly(model, QUESTIONS[:2], block_size=2, sampler="first_hitting")
    same = model_of("in place, 4", plan_block_size=2, execution_block_size=2)
    assert torch.equal(smaller.sequences, generate_quickly(same, QUESTIONS[:2], sampler="first_hitting")[0].sequences)
    with torch.compiler.set_stance("force_eager"):
        flexible = model_of("in place, 4", attn="flex_attention")
        example = random_example(random.Random(7), 4, model.config)
        batch = HierarchicalDataCollator(model.config)([example, random_example(random.Random(8), 2, model.config)])
        inputs = {name: batch[name] for name in ("input_ids", "block_ids", "position_ids", "sees")}
        with torch.no_grad():
            one, other = (m(noisy_input_ids=batch["input_ids"], **inputs).logits for m in (model, flexible))
    is_real = batch["block_ids"] > 0
    assert torch.allclose(one[is_real], other[is_real], atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"execution_order": "tree"}, "`execution_order` must be chain or plan, but got 'tree'"),
        ({"execution_order": "chain"}, "`step_len` must be None for execution_order='chain', but got 8"),
        ({"step_len": None}, r"`step_len` must be an integer in \[2, 24\], but got None"),
        ({"step_len": 6}, "`step_len` must be a multiple of execution_block_size=4 that divides execution_len=48"),
        ({"step_len": 48}, r"`step_len` must be an integer in \[2, 24\], but got 48"),
        ({"joint": True, "block_size": None}, "`execution_order` must be 'chain' with joint=True, but got 'plan'"),
        ({"hierarchical_mask": False}, "`execution_order` must be 'chain' with hierarchical_mask=False"),
        ({"plan_len": 0}, r"`execution_order` must be 'chain' for a model without a plan \(plan_len=0\)"),
        *(
            ({"algorithm": name, "block_size": None}, f"`execution_order` must be 'chain' with algorithm='{name}'")
            for name in ("bd3lm", "mdlm", "sedd", "ar")
        ),
    ],
)
def test_what_cannot_follow_a_plan_is_refused(fields, message):
    if fields.get("algorithm") == "bd3lm":
        fields = fields | {"block_size": 4}
    with pytest.raises(ValueError, match=message):
        make_config(**({"execution_order": "plan", "step_len": 8, "execution_len": 48} | fields))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokenizer": None}, "`tokenizer` must be given for execution_order='plan'"),
        ({"max_new_tokens": 64}, "`max_new_tokens` must be None for execution_order='plan'"),
        ({"max_execution_len": 24}, "`max_execution_len` must be None for execution_order='plan'"),
        ({"execution_ids": torch.tensor([[7]])}, "`execution_ids` must be None for execution_order='plan'"),
        ({"streamer": mock.Mock(spec=["put", "end"])}, "`streamer` must be None for execution_order='plan'"),
    ],
)
def test_what_generation_cannot_do_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of("in place, 4").generate(torch.tensor(QUESTIONS[:1]), **({"tokenizer": Digits} | arguments))


def test_the_table_must_be_given_where_the_order_differs_between_rows():
    model = model_of("in place, 4")
    batch = HierarchicalDataCollator(model.config)([random_example(random.Random(0), 2, model.config)])
    with pytest.raises(ValueError, match="`sees` must be given for execution_order='plan' and for no other"):
        model(input_ids=batch["input_ids"], segment_ids=batch["segment_ids"])
    derived = model(
        input_ids=batch["input_ids"],
        noisy_input_ids=torch.full_like(batch["input_ids"], MASK),
        segment_ids=batch["segment_ids"],
        sees=batch["sees"],
    )
    given = model(
        input_ids=batch["input_ids"],
        noisy_input_ids=torch.full_like(batch["input_ids"], MASK),
        **{name: batch[name] for name in ("block_ids", "position_ids", "sees")},
    )
    assert torch.equal(derived.logits, given.logits)


def test_ancestors_are_closed_whatever_the_plan_names():
    order = BlockOrder.from_config(model_of("in place, 4").config)
    for seed in range(20):
        graph = random_graph(random.Random(seed), MOST_STEPS)
        sees = order.see_steps(graph)
        for part, before in ancestors(graph).items():
            assert sees[part].nonzero().flatten().tolist() == sorted(before | {0})
    with pytest.raises(ValueError, match=f"`depends_on` must have at most {MOST_STEPS} steps, but got 6"):
        order.see_steps([[]] * 6)
