"""What `generate` promises, for one row and in the slowest way: every pass recomputes every token.

Written from the documentation: no cache, no batch, no padding, the mask as a loop over pairs. It draws its random
numbers in the order of `generate` for a batch of one row, so that the same seed gives the same tokens.
"""

import math
from dataclasses import dataclass

import torch

MOVE_CHANCE = {
    "loglinear": lambda t: t,
    "square": lambda t: t * t,
    "cosine": lambda t: 1 - math.cos(math.pi * t / 2),
    "log": lambda t: math.log(1 + t, 2),
}


@dataclass
class Denoised:
    """One row of a `HierBD3LMGenerationOutput` in python.

    `passes` are the token lists that the backbone was given, and `log_probs` those of the tokens of `reveal_steps`, in
    the pass that denoised each.
    """

    sequence: list[int]
    plan: list[int]
    execution: list[int]
    finished: bool
    passes: list[list[int]]
    tokens_per_forward: float
    reveal_steps: list[int]
    log_probs: list[float]

    @property
    def num_forward_passes(self) -> int:
        return len(self.passes)


def denoise(model, question, plan=None, **settings) -> Denoised:
    """The question's plan and execution as token lists.

    Args:
        question: token ids, without padding.
        plan: content ids of a given plan, for `stage="execution"`.
        settings: those of `HierBD3LMGenerationConfig`.
    """
    return SlowDenoiser(model, settings).run(question, plan)


class SlowDenoiser:
    def __init__(self, model, settings):
        defaults = {"stage": "full", "sampler": "confidence", "num_steps": 16, "threshold": 0.9, "entropy_bound": 0.1}
        defaults |= {"tokens_per_step": 1, "left_to_right": False, "temperature": 0.0, "top_p": 1.0}
        defaults |= {"fill_after_end": True, "seed": 0}
        self.settings = defaults | {"max_plan_len": None, "max_execution_len": None} | settings
        self.model, self.config = model, model.config
        self.generator = torch.Generator().manual_seed(self.settings["seed"])
        self.tokens, self.blocks, self.passes = [], [], []
        self.revealed = {}  # place in the sequence -> pass and log-probability
        self.width = max(self.config.plan_block_size, self.config.execution_block_size)
        self.unsaid = {getattr(self.config, f"{role}_token_id") for role in ("mask", "plan", "execution", "pad")}
        self.unsaid -= {self.config.end_token_id}

    def run(self, question, plan):
        self.tokens, self.blocks = list(question), self._question_blocks(question)
        stage, contents, finished, num_tokens = self.settings["stage"], {}, True, 0
        if plan is not None:
            self._append_given_plan(list(plan))
            contents["plan"] = list(plan)
        revealed = []
        segments = {"full": ["plan", "execution"], "plan": ["plan"], "execution": ["execution"]}[stage]
        for segment in segments:
            tokens = self._denoise_segment(segment)
            ended = self.config.end_token_id in tokens
            content = tokens[1 : tokens.index(self.config.end_token_id)] if ended else tokens[1:]
            contents[segment], finished = content, finished and ended
            start = len(self.tokens) - len(tokens) + 1
            revealed += [self.revealed[place] for place in range(start, start + len(content) + ended)]
            num_tokens += len(content) + ended
        return Denoised(
            sequence=self.tokens,
            plan=contents["plan"],
            execution=contents.get("execution", []),
            finished=finished,
            passes=self.passes,
            tokens_per_forward=num_tokens / len(self.passes),
            reveal_steps=[step for step, _ in revealed],
            log_probs=[log_prob for _, log_prob in revealed],
        )

    def _question_blocks(self, question):
        is_causal = self.config.question_attention == "causal"
        return [number - len(question) if is_causal else 0 for number in range(len(question))]

    def _append_given_plan(self, plan):
        segment = [self.config.plan_token_id, *plan, self.config.end_token_id]
        while len(segment) % self.config.plan_block_size:
            segment.append(self.config.end_token_id)
        for number, token in enumerate(segment[: self.config.plan_len]):
            self.tokens.append(token)
            self.blocks.append(1 + number // self.config.plan_block_size)

    def _denoise_segment(self, segment):
        size = getattr(self.config, f"{segment}_block_size")
        limit = self.settings[f"max_{segment}_len"] or getattr(self.config, f"{segment}_len")
        written = []
        while len(written) < limit and self.config.end_token_id not in written:
            block = [self.config.mask_token_id] * size
            if not written:
                block[0] = getattr(self.config, f"{segment}_token_id")
            block = self._denoise_block(block)
            self.blocks += [1 + max(self.blocks, default=0)] * size
            self.tokens += block
            written += block
        return written

    def _denoise_block(self, block):
        """A finished block: everything after its first `<|end|>` is `<|end|>`."""
        ranks = self._reveal_ranks(len(block))
        while self.config.mask_token_id in block:
            masked = [place for place, token in enumerate(block) if token == self.config.mask_token_id]
            if ranks is not None:
                latest = max(ranks[place] for place in masked)
                masked = [place for place in masked if ranks[place] == latest]
            logits = self._logits(block, masked)
            drafted = dict(zip(masked, [self._draw(row) for row in logits], strict=True))
            for place in self._accepted(masked, logits, drafted):
                block[place] = drafted[place]
                log_probs = logits[masked.index(place)].log_softmax(dim=0)
                self.revealed[len(self.tokens) + place] = len(self.passes), float(log_probs[drafted[place]])
            if self.settings["fill_after_end"]:
                block = self._with_end_filled(block)
        return self._with_end_filled(block)

    def _with_end_filled(self, block):
        end = self.config.end_token_id
        return [end if end in block[: place + 1] else token for place, token in enumerate(block)]

    def _reveal_ranks(self, size):
        """The number of each place that tells when it is revealed, the highest first; None if predictions tell."""
        if self.settings["temperature"] == 0:
            chances = [1 - (place + 0.5) / size for place in range(size)]
        else:
            chances = torch.rand((1, self.width), generator=self.generator, dtype=torch.float64)[0].tolist()
        if self.settings["sampler"] == "first_hitting":
            return chances
        if self.settings["sampler"] == "ancestral":
            return [self._step_of(chance) for chance in chances]
        return None

    def _step_of(self, chance):
        """Going from step k to k - 1 reveals a token that is masked with more than the one's mask probability."""
        num_steps, step = self.settings["num_steps"], 1
        while MOVE_CHANCE[self.config.noise](step / num_steps) < chance:
            step += 1
        return step

    def _logits(self, block, places):
        """Logits at some places of the block, from one pass over all finished tokens and the block."""
        tokens, blocks = self.tokens + block, self.blocks + [1 + max(self.blocks, default=0)] * len(block)
        self.passes.append(tokens)
        with torch.no_grad():
            logits = self.model.backbone(
                input_ids=torch.tensor([tokens]),
                attention_mask=self._mask(blocks),
                position_ids=torch.arange(len(tokens))[None],
                use_cache=False,
            ).logits
        first = len(self.tokens) - (self.config.prediction == "shifted")
        logits = logits[0].float()
        logits[:, sorted(self.unsaid)] = -math.inf
        return [logits[first + place] for place in places]

    def _mask(self, blocks):
        """A token sees its own block and those before: there is one copy of each token here."""
        backbone = self.config.backbone_config
        everywhere = [[k <= q for k in blocks] for q in blocks]
        if "sliding_attention" not in (getattr(backbone, "layer_types", None) or []):
            return torch.tensor(everywhere)[None, None]
        near = [
            [sees and abs(q - k) < backbone.sliding_window for k, sees in enumerate(row)]
            for q, row in enumerate(everywhere)
        ]
        masks = {"full_attention": everywhere, "sliding_attention": near}
        return {kind: torch.tensor(mask)[None, None] for kind, mask in masks.items()}

    def _draw(self, logits):
        temperature, top_p = self.settings["temperature"], self.settings["top_p"]
        if temperature == 0:
            return int(logits.argmax())
        scores = logits.double() / temperature
        if top_p < 1:
            probabilities, above = scores.softmax(dim=0).tolist(), 0.0
            for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
                if above >= top_p:
                    scores[token] = -math.inf
                above += probabilities[token]
        uniform = torch.rand((1, len(scores)), generator=self.generator, dtype=torch.float64)[0]
        return int((scores - (-uniform.log()).log()).argmax())

    def _accepted(self, masked, logits, drafted):
        """The places whose drafts stay, by the untempered probabilities."""
        sampler, accepted, entropies, sure = self.settings["sampler"], [], [], True
        if sampler in ("first_hitting", "ancestral"):
            return masked
        probabilities = {place: row.softmax(dim=0).tolist() for place, row in zip(masked, logits, strict=True)}
        confidence = {place: probabilities[place][drafted[place]] for place in masked}
        entropy = {place: -sum(p * math.log(p) for p in row if p > 0) for place, row in probabilities.items()}
        doubt = {place: -confidence[place] if sampler == "confidence" else entropy[place] for place in masked}
        for place in sorted(masked) if self.settings["left_to_right"] else sorted(masked, key=doubt.get):
            entropies.append(entropy[place])
            if sampler == "confidence":
                sure = sure and confidence[place] > self.settings["threshold"]
            else:
                sure = sum(entropies) - max(entropies) <= self.settings["entropy_bound"]
            if sure or len(accepted) < self.settings["tokens_per_step"]:
                accepted.append(place)
        return accepted
