"""What `execution_order="plan"` promises, for one row and in the slowest way: every token is recomputed in each pass.

Written from the documentation: no cache, no batch, no padding, no table; who sees whom is a loop over pairs.
"""

import math
from dataclasses import dataclass, field

import torch

QUESTION, PLAN = -1, 0  # parts; steps are 1, 2, ..., the answer is the part after them


def ancestors(depends_on):
    """All steps, counted from 1, that each part needs; the answer, the last part, needs all."""
    found = {}
    for step, earlier in enumerate(depends_on, 1):
        found[step] = {other + 1 for other in earlier}.union(*(found[other + 1] for other in earlier))
    return found | {len(depends_on) + 1: set(range(1, len(depends_on) + 1))}


@dataclass(frozen=True)
class Token:
    """A clean token: `block` counts from 0 in each part."""

    token: int
    position: int
    part: int
    block: int


@dataclass
class SlowGraph:
    """One row: its finished tokens, and who sees whom.

    Args:
        depends_on: as in the data; None as long as the plan is not known.
    """

    model: torch.nn.Module
    question: list[int]
    depends_on: list[list[int]] | None = None
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self):
        self.config = self.model.config
        self.tokens = [Token(token, place, QUESTION, 0) for place, token in enumerate(self.question)]

    def sees(self, query, key):
        if key.part == QUESTION:
            is_causal = self.config.question_attention == "causal" and query.part == QUESTION
            return key.position <= query.position if is_causal else True
        if query.part == key.part:
            return key.block <= query.block
        return query.part > PLAN and (key.part == PLAN or key.part in ancestors(self.depends_on)[query.part])

    def start(self, part):
        if part == PLAN:
            return len(self.question)
        plan = sum(token.part == PLAN for token in self.tokens)
        return len(self.question) + plan + (part - 1) * self.config.step_len

    def block_size(self, part):
        return self.config.plan_block_size if part == PLAN else self.config.execution_block_size

    def append(self, part, tokens):
        """Add a finished part, opener, `<|end|>` and filler included."""
        start, size = self.start(part), self.block_size(part)
        self.tokens += [Token(token, start + place, part, place // size) for place, token in enumerate(tokens)]

    def logits(self, part, number, block):
        """Logits that predict each place of a noisy block, the `number`-th of its part; None for a given opener."""
        size = self.block_size(part)
        first = self.start(part) + number * size
        noisy = [Token(token, first + place, part, number) for place, token in enumerate(block)]
        noisy_part = {id(token) for token in noisy}
        finished = [token for token in self.tokens if not (token.part == part and token.block >= number)]
        everything = finished + noisy
        mask = [
            [(id(q) in noisy_part) if id(k) in noisy_part else self.sees(q, k) for k in everything] for q in everything
        ]
        with torch.no_grad():
            logits = self.model.backbone(
                input_ids=torch.tensor([[token.token for token in everything]]),
                attention_mask=torch.tensor([[mask]]),
                position_ids=torch.tensor([[token.position for token in everything]]),
                use_cache=False,
            ).logits[0]
        rows = {token.position: logits[place] for place, token in enumerate(finished) if token.part == part}
        rows |= {token.position: logits[len(finished) + place] for place, token in enumerate(noisy)}
        shift = self.config.prediction == "shifted"
        return [rows.get(token.position - shift) for token in noisy]


def nelbo(row, part, tokens, first_masked=1):
    """The exact bound of a finished part, in nats: every mask of every block, weighed by its size."""
    size, total = row.block_size(part), 0.0
    for number in range(len(tokens) // size):
        block = tokens[number * size : (number + 1) * size]
        free = [place for place in range(size) if number * size + place >= first_masked]
        for bits in range(1, 2 ** len(free)):
            masked = [place for index, place in enumerate(free) if bits >> index & 1]
            noisy = [row.config.mask_token_id if place in masked else token for place, token in enumerate(block)]
            logits = row.logits(part, number, noisy)
            for place in masked:
                scores = logits[place].clone()
                scores[row.config.mask_token_id] = -math.inf
                nll = -scores.log_softmax(dim=0)[block[place]]
                total += float(nll) / len(masked) / math.comb(len(free), len(masked))
    return total


@dataclass
class Written:
    parts: list[list[int]]
    num_forward_passes: int
    finished: bool


def generate(model, question, read_plan, threshold=None):
    """Denoise plan, steps and answer greedily.

    Args:
        read_plan: maps the plan's content to `depends_on`.
        threshold: of the confidence sampler; None is one token per pass, from the left.
    """
    config, row = model.config, SlowGraph(model, question)
    plan, passes, finished = _denoise(row, PLAN, config.plan_token_id, config.plan_len, threshold)
    parts, done = [plan], {PLAN: passes}  # the number of passes after which each part is finished
    content = plan[1:]
    content = content[: content.index(config.end_token_id)] if config.end_token_id in content else content
    row.depends_on = read_plan(content)
    for part, before in ancestors(row.depends_on).items():
        tokens, passes, closed = _denoise(row, part, config.execution_token_id, config.step_len, threshold)
        parts.append(tokens)
        done[part] = max(done[other] for other in before | {PLAN}) + passes
        finished = finished and closed
    return Written(parts, max(done.values()), finished)


def _denoise(row, part, opener, limit, threshold):
    """Tokens of a part, the number of passes that they take, and whether an `<|end|>` closes it."""
    config, size, written, passes = row.config, row.block_size(part), [], 0
    unsaid = [config.mask_token_id, config.plan_token_id, config.execution_token_id, config.pad_token_id]
    while len(written) < limit and config.end_token_id not in written:
        number, block = len(written) // size, [config.mask_token_id] * size
        if not written:
            block[0] = opener
        while config.mask_token_id in block:
            passes += 1
            logits = row.logits(part, number, block)
            drafts = {}
            for place, token in enumerate(block):
                if token == config.mask_token_id:
                    scores = logits[place].clone()
                    scores[unsaid] = -math.inf
                    drafts[place] = (float(scores.softmax(dim=0).max()), int(scores.argmax()))
            chosen = min(drafts) if threshold is None else max(drafts, key=lambda place: drafts[place][0])
            for place, (confidence, token) in drafts.items():
                if place == chosen or (threshold is not None and confidence > threshold):
                    block[place] = token
            if config.end_token_id in block:
                end = block.index(config.end_token_id)
                block[end:] = [config.end_token_id] * (size - end)
        written += block
        row.tokens = [token for token in row.tokens if token.part != part]
        row.append(part, written)
    return written, passes, config.end_token_id in written
