"""Every algorithm lays out, sees and measures what its paper says, and all of them count the same tokens."""

import itertools
import math

import pytest
import torch
from transformers import Qwen3Config

from hierbd3lm.configuration_hierbd3lm import HierBD3LMConfig
from hierbd3lm.data.collator import HierarchicalDataCollator, example_length
from hierbd3lm.diffusion_hierbd3lm import ESTIMATORS, SCHEDULES, draw_mask, score_entropy, token_nll
from hierbd3lm.evaluation.likelihood import measure_batch, with_predicted_tokens
from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.order_hierbd3lm import BlockOrder
from hierbd3lm.training.objectives import make_objective

from .tiny import FIRST_CONTENT_ID, layout_from_segments, make_config, make_model
from .tiny_algorithms import ABLATIONS, ALGORITHMS, ALL, OWN_SIZE
from .tiny_backbones import make_backbone_config

END, PLAN, EXECUTION, MASK = 1, 2, 3, 4  # tiny.TINY_TOKEN_IDS
LENGTHS = [(5, 2, 3), (1, 0, 6), (3, 6, 1)]  # content tokens of question, plan, execution


def make_examples(lengths=LENGTHS, vocab_size=40):
    generator = torch.Generator().manual_seed(0)
    names = ("question_ids", "plan_ids", "execution_ids")
    return [
        {
            name: torch.randint(FIRST_CONTENT_ID, vocab_size, (n,), generator=generator).tolist()
            for name, n in zip(names, row, strict=True)
        }
        for row in lengths
    ]


def batch_for(model, examples=None, **collator):
    examples = make_examples() if examples is None else examples
    return with_predicted_tokens(model, HierarchicalDataCollator(model.config, **collator)(examples))


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=atol)


# Configuration


def test_block_sizes_follow_from_the_algorithm():
    sizes = {
        name: (c.plan_block_size, c.execution_block_size)
        for name, c in ((n, make_config(**a)) for n, a in ALL.items())
    }
    assert sizes["hier"] == sizes["bd3lm"] == sizes["block by block, without"] == (4, 4)
    assert sizes["mdlm"] == sizes["sedd"] == (48, 48)
    assert sizes["ar"] == (1, 1)
    assert sizes["joint, with the mask"] == sizes["joint, without"] == (24, 24)


@pytest.mark.parametrize("name", ALL)
def test_configuration_survives_saving(name, tmp_path):
    config = make_config(**ALL[name])
    config.save_pretrained(tmp_path)
    assert HierBD3LMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_checkpoint_is_read_as_another_algorithm(tmp_path):
    make_config().save_pretrained(tmp_path)
    assert HierBD3LMConfig.from_pretrained(tmp_path, algorithm="mdlm").plan_block_size == 48
    assert HierBD3LMConfig.from_pretrained(tmp_path, algorithm="bd3lm").plan_block_size == 4
    make_config(**ALGORITHMS["mdlm"]).save_pretrained(tmp_path)
    assert HierBD3LMConfig.from_pretrained(tmp_path, algorithm="hier", block_size=8).plan_block_size == 8
    with pytest.raises(ValueError, match="`plan_block_size` must be omitted or 48 for algorithm='sedd', but got 4"):
        HierBD3LMConfig.from_pretrained(tmp_path, algorithm="sedd", block_size=4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"algorithm": "d3pm"}, "`algorithm` must be one of hier, bd3lm, mdlm, sedd, ar, but got 'd3pm'"),
        ({"algorithm": "mdlm"}, "`plan_block_size` must be omitted or 48 for algorithm='mdlm', but got 4"),
        ({"algorithm": "ar"}, "`plan_block_size` must be omitted or 1 for algorithm='ar', but got 4"),
        ({"joint": True}, "`plan_block_size` must be omitted or 24 for joint=True, but got 4"),
        ({"algorithm": "bd3lm", "joint": True}, "`joint` must be False for algorithm='bd3lm', but got True"),
        ({"algorithm": "ar", "hierarchical_mask": False}, "`hierarchical_mask` must be True for algorithm='ar'"),
        ({"hierarchical_mask": 1}, "`hierarchical_mask` must be True or False, but got 1"),
        ({"algorithm": "bd3lm", "block_size": 5}, "`plan_block_size` must divide the segment's length 48, but got 5"),
        ({"hierarchical_mask": False, "plan_clip": [0.1, 1.0]}, "`plan_clip` must equal `execution_clip`"),
        (
            {"algorithm": "bd3lm", "block_size": None, "plan_block_size": 4, "execution_block_size": 8},
            "`plan_block_size` must equal `execution_block_size`",
        ),
    ],
)
def test_what_an_algorithm_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_blocks_of_bd3lm_may_cross_the_edge_of_a_segment():
    config = make_config(algorithm="bd3lm", plan_len=10, execution_len=14, block_size=8)  # neither is whole blocks
    segment_ids = torch.tensor([[1] * 10 + [2] * 14])
    assert BlockOrder.from_config(config).layout(segment_ids)[0].tolist() == [[1] * 8 + [2] * 8 + [3] * 8]


# Layout


def reference_tokens(example, config):
    """(id, segment, block, position, label) of the tokens after the question, one after the other."""
    tokens, count = [], len(example["question_ids"])

    def write(token, segment, label):
        tokens.append((token, segment, label))

    for segment, name, opener in ((1, "plan", PLAN), (2, "execution", EXECUTION)):
        size = getattr(config, f"{name}_block_size")
        write(opener, segment, -100)
        for token in [*example[f"{name}_ids"], END]:
            write(token, segment, token)
        if config.algorithm == "hier":
            while sum(token[1] == segment for token in tokens) % size:
                write(END, segment, -100)
    while config.algorithm != "hier" and len(tokens) % config.plan_block_size:
        write(END, 2, -100)
    num_plan = sum(token[1] == 1 for token in tokens)
    rows = []
    for place, (token, segment, label) in enumerate(tokens):
        in_segment = place if segment == 1 else place - num_plan
        size = config.plan_block_size if segment == 1 else config.execution_block_size
        block, position = 1 + in_segment // size, count + place
        if config.algorithm != "hier":
            block = 1 + place // size
        elif config.hierarchical_mask:
            block += (segment == 2) * num_plan // config.plan_block_size
        else:
            position = count + in_segment + (segment == 2) * config.plan_len
        rows.append((token, segment, block, position, label))
    return rows


@pytest.mark.parametrize("fixed_length", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_layout_equals_a_reference_that_goes_token_by_token(name, fixed_length):
    config, examples = make_config(**ALL[name]), make_examples()
    batch = HierarchicalDataCollator(config, fixed_length=fixed_length)(examples)
    for row, example in enumerate(examples):
        real = batch["segment_ids"][row] > 0
        columns = [batch[key][row][real].tolist() for key in ("input_ids", "segment_ids", "block_ids", "position_ids")]
        rows = list(zip(*columns, batch["labels"][row][real].tolist(), strict=True))
        assert rows == reference_tokens(example, config)
        assert example_length(example, config) == len(rows) + len(example["question_ids"])
    assert batch["input_ids"].shape[1] == (64 if fixed_length else batch["input_ids"].shape[1])


@pytest.mark.parametrize("name", ALL)
def test_every_algorithm_counts_and_predicts_the_same_tokens(name):
    """All predict content and the first <|end|> of each segment; a flat order predicts <|execution|> besides."""
    model = make_model(**ALL[name])
    batch = batch_for(model)
    counted = [row[row != -100].tolist() for row in batch["labels"]]
    assert counted == [[*e["plan_ids"], END, *e["execution_ids"], END] for e in make_examples()]
    assert (batch["maskable"] | (batch["labels"] == -100)).all()
    uncounted = batch["input_ids"][batch["maskable"] & (batch["labels"] == -100)].tolist()
    assert uncounted.count(EXECUTION) == (len(LENGTHS) if model.config.is_flat else 0)
    assert set(uncounted) <= {EXECUTION, END}


def test_padding_moves_no_position_in_any_order():
    rows = "QQPPPPEEEE", "..QQPP.PPE..EEE."
    alone, padded = (torch.tensor([[".QPE".index(letter) - 1 for letter in row]]) for row in rows)
    real = padded >= 0
    for order in ("hierarchical", "flat", "paired"):
        for expected, ids, filler in zip(
            layout_from_segments(alone, 3, 2, order, 6),
            layout_from_segments(padded, 3, 2, order, 6),
            (-1, 0),
            strict=True,
        ):
            assert torch.equal(expected[0], ids[real]) and (ids[~real] == filler).all()


# Who sees whom


def influences(name, vocab_token=7):
    """moves[k] are the columns whose loss changes when the noisy or clean token of column k does."""
    model = make_model(**ALL[name]).double()
    (example,) = make_examples([(3, 2, 2)])
    batch = batch_for(model, [example])
    objective = make_objective(model.config)
    masked = torch.zeros_like(batch["maskable"])
    masked[0, batch["maskable"][0].nonzero()[::2, 0]] = True  # every other token that is predicted

    def losses(changed=None):
        ids = batch["input_ids"].clone()
        if changed is not None:
            ids[0, changed] = vocab_token if ids[0, changed] != vocab_token else vocab_token + 1
        with torch.no_grad():
            return objective.token_losses(model, batch | {"input_ids": ids}, masked)

    base, columns, moves = losses(), masked[0].nonzero()[:, 0].tolist(), {}
    for column in range(batch["input_ids"].shape[1]):
        if not masked[0, column]:
            different = (losses(column) - base).abs() > 1e-9
            moves[column] = {c for c, is_different in zip(columns, different.tolist(), strict=True) if is_different}
    segments = batch["segment_ids"][0].tolist()
    return moves, {number: [c for c in columns if segments[c] == number] for number in (1, 2)}, batch


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_plan_sees_the_execution_only_without_the_hierarchical_mask(name):
    moves, masked, batch = influences(name)
    of_execution = [c for c in moves if batch["segment_ids"][0, c] == 2]
    of_plan = [c for c in moves if batch["segment_ids"][0, c] == 1]
    assert of_execution and of_plan and masked[1] and masked[2]
    plan_is_moved = any(moves[c] & set(masked[1]) for c in of_execution)
    assert plan_is_moved is ("without" in name)
    assert any(moves[c] & set(masked[2]) for c in of_plan)  # the execution always sees something of the plan


def test_a_joint_execution_sees_the_noisy_plan_and_not_the_clean_one():
    """A token of the plan that is masked cannot be read anywhere: only those that are not move the execution."""
    model = make_model(**ABLATIONS["joint, with the mask"])
    batch, objective = batch_for(model, make_examples([(3, 4, 4)])), make_objective(model.config)
    masked = batch["maskable"].clone()
    masked[0, 6] = False
    changed = batch["input_ids"].clone()
    for column, moves in ((5, False), (6, True)):
        ids = changed.clone()
        ids[0, column] = 39 if ids[0, column] != 39 else 38
        with torch.no_grad():
            before, after = (
                objective.token_losses(model, batch | {"input_ids": x}, masked) for x in (batch["input_ids"], ids)
            )
        in_execution = batch["segment_ids"][masked] == 2
        assert torch.allclose(before[in_execution], after[in_execution]) is not moves


def test_joint_losses_equal_one_pass_of_the_backbone_under_a_mask_by_hand():
    model = make_model(**ABLATIONS["joint, with the mask"])
    batch = batch_for(model, make_examples([(3, 4, 4)]))
    masked = draw_mask(batch["block_ids"].clamp(max=1), batch["maskable"]).masked
    xt = batch["input_ids"].masked_fill(masked, MASK)
    segments = batch["segment_ids"][0]
    mask = segments[:, None] >= segments[None, :]
    with torch.no_grad():
        actual = make_objective(model.config).token_losses(model, batch, masked)
        logits = model.backbone(xt, attention_mask=mask[None, None], position_ids=batch["position_ids"]).logits
    logits[..., MASK] = -math.inf
    expected = -logits.log_softmax(dim=-1)[masked].gather(1, batch["input_ids"][masked][:, None])[:, 0]
    assert_close(actual, expected)


def test_copies_of_a_joint_batch_are_losses_of_each():
    model = make_model(**ABLATIONS["joint, with the mask"])
    batch, objective = batch_for(model), make_objective(model.config)
    draws = [draw_mask(batch["block_ids"].clamp(max=1), batch["maskable"]).masked for _ in range(2)]
    with torch.no_grad():
        together = objective.token_losses(model, batch, torch.stack(draws, dim=1))
        alone = [torch.zeros(d.shape).masked_scatter(d, objective.token_losses(model, batch, d)) for d in draws]
    assert_close(together, torch.stack(alone, dim=1)[torch.stack(draws, dim=1)])


# Likelihood


@pytest.mark.parametrize("name", [name for name in ALL if name != "ar"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_nelbo_is_an_unbiased_estimate_of_the_enumerated_bound(name, estimator):
    sizes = {"plan_len": 2, "execution_len": 4} if name != "bd3lm" else {"plan_len": 4, "execution_len": 4}
    blocks = {"block_size": 2} if name in ("hier", "block by block, with the mask", "block by block, without") else {}
    model = make_model(**(sizes | ALL[name] | blocks))
    examples = make_examples([(2, 0, 1)]) * 24
    batch, objective = batch_for(model, examples), make_objective(model.config, estimator)
    first = {key: value[:1] for key, value in batch.items()}
    with torch.no_grad():
        exact = objective.exact(model, first).sum()
        generator = torch.Generator().manual_seed(0)
        values = torch.cat([objective.token_nelbo(model, batch, generator).double().sum(dim=1) for _ in range(24)])
    # The draws of a batch are antithetic: batches are what is independent.
    means = values.view(24, 24).mean(dim=1)
    error = means.std() / math.sqrt(24)
    assert abs(means.mean() - exact) < 4.5 * error + 1e-4 * exact
    assert error < 0.1 * exact


@pytest.mark.parametrize("backbone", ["qwen3", "gpt2", "gemma3"])
def test_nll_of_ar_is_the_backbones_own_causal_cross_entropy(backbone):
    model = make_model(backbone_config=make_backbone_config(backbone), attn_implementation=None, **ALGORITHMS["ar"])
    batch = batch_for(model)
    nats = measure_batch(make_objective(model.config), model, batch, num_draws=3)
    assert nats.shape == (3, 2, 2)  # one draw, as there is no noise, and the counts
    for row, example in enumerate(make_examples()):
        plan, execution = [*example["plan_ids"], END], [EXECUTION, *example["execution_ids"], END]
        given = [*example["question_ids"], PLAN]
        ids = torch.tensor([given + plan + execution])
        for column, (low, high) in enumerate(((0, len(plan)), (len(plan), len(plan + execution)))):
            labels = torch.full_like(ids, -100)
            labels[0, len(given) + low : len(given) + high] = ids[0, len(given) + low : len(given) + high]
            with torch.no_grad():
                mean = model.backbone(ids, labels=labels).loss.double()
            assert nats[row, 0, column].item() == pytest.approx(float(mean) * (high - low), rel=1e-5)
        assert nats[row, 1].tolist() == [len(plan), len(execution) - 1]


def test_the_gradient_of_ar_is_that_of_the_cross_entropy():
    model = make_model(**ALGORITHMS["ar"])
    batch = batch_for(model, make_examples([(3, 2, 2)]))
    make_objective(model.config).token_nelbo(model, batch).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    ids = batch["input_ids"]
    labels = ids.masked_fill(~batch["maskable"], -100)
    (model.backbone(ids, labels=labels).loss * batch["maskable"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert_close(ours[name], parameter.grad, atol=1e-4)


def test_block_size_one_is_the_likelihood_token_by_token_of_the_same_weights():
    """No noise is left, and each token is predicted from all before it, <|execution|> among them."""
    model = make_model(algorithm="bd3lm", block_size=1)
    batch, objective = batch_for(model), make_objective(model.config)
    with torch.no_grad():
        assert torch.equal(*(objective.token_nelbo(model, batch) for _ in range(2)))
    nats = measure_batch(objective, model, batch, num_draws=2)
    assert nats.shape[1] == 2  # one draw, and the counts
    assert_close(measure_batch(objective, model, batch, 1, exact=True)[:, 0], nats[:, 0])
    for row, example in enumerate(make_examples()):
        given = [*example["question_ids"], PLAN]
        run = [*example["plan_ids"], END, EXECUTION, *example["execution_ids"], END]
        total = 0.0
        for place, token in enumerate(run):
            tokens = given + run[:place] + [MASK]
            mask = torch.ones(len(tokens), len(tokens)).tril().bool()
            mask[: len(given) - 1, : len(given) - 1] = True  # the question sees itself
            with torch.no_grad():
                logits = model.backbone(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0, -1]
            logits[MASK] = -math.inf
            total -= float(logits.log_softmax(dim=-1)[token])
        assert float(nats[row, 0].sum()) == pytest.approx(total, rel=1e-5)


@pytest.fixture(scope="module")
def tiny_mdlm():
    """An MDLM of three predicted tokens over seven: all its sequences and all its orders can be enumerated."""
    torch.manual_seed(1)
    backbone = Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=None,
    )  # fmt: skip
    model = make_model(algorithm="mdlm", **OWN_SIZE, plan_len=2, execution_len=2, backbone_config=backbone)
    # <|plan|> is given; <|end|>, <|execution|> and <|end|> are what an example has to predict
    canvases = torch.tensor(list(itertools.product(range(8), repeat=3)))
    tokens = torch.cat([torch.tensor([[5, 6, PLAN]]).expand(512, 3), canvases], dim=1)
    with torch.no_grad():
        blocks = torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(512, 6)
        positions = torch.arange(6).expand(512, 6)
        logits = model(input_ids=tokens, block_ids=blocks, position_ids=positions).logits[:, 3:].double()
    logits[..., MASK] = -math.inf
    return model, logits.log_softmax(dim=-1)  # (canvas in base 8, place, token)


def log_likelihoods(log_p, tokens):
    """Log-probability of each order of revealing the three tokens."""
    values = []
    for order in itertools.permutations(range(3)):
        canvas, total = [MASK] * 3, 0.0
        for place in order:
            number = sum(token * 8**power for token, power in zip(canvas, (2, 1, 0), strict=True))
            total += log_p[number, place, tokens[place]].item()
            canvas[place] = tokens[place]
        values.append(total)
    return torch.tensor(values, dtype=torch.float64)


def test_bound_of_mdlm_is_above_the_exact_nll_which_sums_to_one(tiny_mdlm):
    """The exact likelihood is the mean over the orders, the bound the mean of their logarithms."""
    _, log_p = tiny_mdlm
    sequences = itertools.product([token for token in range(8) if token != MASK], repeat=3)
    by_order = torch.stack([log_likelihoods(log_p, tokens) for tokens in sequences])  # (343, 6)
    likelihood = by_order.exp().mean(dim=1)
    assert likelihood.sum().item() == pytest.approx(1, rel=1e-6)
    gap = likelihood.log() - by_order.mean(dim=1)
    assert (gap > -1e-9).all() and gap.max() > 0.05


def test_measured_bound_of_mdlm_is_the_mean_over_all_orders(tiny_mdlm):
    model, log_p = tiny_mdlm
    example = {"question_ids": [5, 6], "plan_ids": [], "execution_ids": []}
    batch = batch_for(model, [example])
    assert batch["input_ids"].tolist() == [[5, 6, PLAN, END, EXECUTION, END]]
    exact = measure_batch(make_objective(model.config), model, batch, 1, exact=True)[0, 0].sum()
    by_order = log_likelihoods(log_p, [END, EXECUTION, END])
    assert exact.item() == pytest.approx(-by_order.mean().item(), rel=1e-5)
    assert exact.item() > -by_order.exp().mean().log().item()


def published_score_entropy(log_score, sigma, x, x0):
    """Loss of one masked token as the absorbing graph of Lou et al. 2024 has it; the mask is the last state."""
    esigm1 = math.expm1(sigma)
    ratio = 1 / esigm1
    assert x == len(log_score) - 1
    negative = ratio * log_score[x0]
    positive = log_score[:-1].exp().sum()
    constant = ratio * (math.log(ratio) - 1)
    return positive - negative + constant


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("noise", SCHEDULES)
def test_score_entropy_is_the_published_loss_at_every_time(noise, t):
    logits, schedule = torch.randn(5, 9, dtype=torch.float64), SCHEDULES[noise]
    time = torch.tensor(t, dtype=torch.float64)
    p, rate = float(schedule.move_chance(time)), float(schedule.rate(time))
    sigma, rate_of_sigma = -math.log(1 - p), rate / (1 - p)
    scaled = logits - math.log(math.expm1(sigma)) - math.log(8)  # "scale by sigma": 8 states besides the mask
    expected = [rate_of_sigma * published_score_entropy(row, sigma, 8, x0).item() for x0, row in enumerate(scaled)]
    actual = rate / p * score_entropy(logits, torch.arange(5), mask_token_id=8)
    assert actual.tolist() == pytest.approx(expected, rel=1e-5)


def test_score_entropy_of_normalised_predictions_is_their_nll_and_else_is_more():
    logits, x0 = torch.randn(6, 9) * 3, torch.randint(0, 8, (6,))
    nll = token_nll(logits, x0, 8)
    real = logits[:, :8]
    normalised = torch.cat([real.log_softmax(dim=-1) + math.log(8), logits[:, 8:]], dim=1)
    assert_close(score_entropy(normalised, x0, 8), nll)
    assert (score_entropy(logits, x0, 8) > nll).all()


def test_bound_of_sedd_is_that_of_mdlm_for_the_same_predictions():
    models = {name: make_model(**ALGORITHMS[name]) for name in ("mdlm", "sedd")}
    models["sedd"].load_state_dict(models["mdlm"].state_dict())

    def normalise(module, inputs, logits):
        predicted = logits.index_fill(-1, torch.tensor([MASK]), -math.inf)
        return logits - predicted.logsumexp(dim=-1, keepdim=True) + math.log(logits.shape[-1] - 1)

    def nats(name):
        model, generator = models[name], torch.Generator().manual_seed(0)
        return measure_batch(make_objective(model.config), model, batch_for(model), 3, generator)

    unnormalised = nats("sedd")
    assert (unnormalised[:, :3].sum(dim=2) > nats("mdlm")[:, :3].sum(dim=2)).all()
    for model in models.values():
        model.get_output_embeddings().register_forward_hook(normalise)
    assert_close(nats("sedd"), nats("mdlm"), atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_row_has_the_same_bound_in_a_batch_and_alone(name):
    model = make_model(**ALL[name])
    objective = make_objective(model.config)

    def losses(examples):
        batch = batch_for(model, examples)
        with torch.no_grad():
            if name == "ar":
                nelbo = objective.token_nelbo(model, batch)
            else:
                masked = batch["maskable"]
                nelbo = torch.zeros(masked.shape).masked_scatter(masked, objective.token_losses(model, batch, masked))
        return [row[maskable] for row, maskable in zip(nelbo, batch["maskable"], strict=True)]

    together = losses(make_examples())
    for row, example in zip(together, make_examples(), strict=True):
        assert_close(row, losses([example])[0], atol=1e-4)


def test_ar_takes_no_noise_and_needs_no_layout():
    model = make_model(**ALGORITHMS["ar"])
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert_close(logits[0, 2:], model.backbone(ids[:1, 2:]).logits[0])
        assert_close(logits[1], model(ids[1:]).logits[0])
        segments = torch.where(mask == 1, 0, -1)
        assert_close(model(ids, segment_ids=segments).logits, logits)
    with pytest.raises(ValueError, match="`noisy_input_ids` must be None for a model without noise"):
        model(ids, noisy_input_ids=ids)


@pytest.mark.parametrize("name", ["ar", "sedd", "joint, with the mask"])
def test_a_model_is_saved_and_loaded_as_its_algorithm(name, tmp_path):
    model = make_model(**ALL[name])
    model.save_pretrained(tmp_path)
    loaded = HierBD3LMForBlockDiffusion.from_pretrained(tmp_path)
    generator = [torch.Generator().manual_seed(0) for _ in range(2)]
    nats = [
        measure_batch(make_objective(m.config), m, batch_for(m), 1, g)
        for m, g in zip((model, loaded), generator, strict=True)
    ]
    assert_close(*nats)
