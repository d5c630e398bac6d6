"""A server on loopback, in a thread of the test, and a model that waits where a test tells it to."""

import threading
import time
from contextlib import contextmanager

import openai

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.serving.arguments import ServeArguments
from hierbd3lm.training.lora import load_tokenizer

from .tiny_evaluation import SHORT

NAME = "tiny"
SECONDS = 60  # after which a test gives up
QUESTIONS = ["Ann has 3 apples.", "Ben buys 12 pens and 4 more.", "Cy?", "How many pens does Ben have?", "2 + 3"]


class Server:
    """What a test sees of a server."""

    def __init__(self, server):
        self.app = server.config.app
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.service = self.app.state.service
        self.model, self.engine = self.service.model, self.service.engine
        self.batches = []  # numbers of rows
        observe = self.engine.observe_batch
        self.engine.observe_batch = lambda batch: (self.batches.append(len(batch)), observe(batch))
        self.client = self.make_client()

    def make_client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def ask(self, question, client=None, **fields):
        messages = [{"role": "user", "content": question}]
        return (client or self.client).chat.completions.create(model=NAME, messages=messages, **fields)

    def metric(self, name, **labels):
        return self.service.metrics.registry.get_sample_value(f"hierbd3lm_{name}", labels)


@contextmanager
def serving(checkpoint, **fields):
    from hierbd3lm.serving.process import make_server

    defaults = {"model": str(checkpoint), "served_name": NAME, "port": 0, "device": "cpu"}
    server = make_server(ServeArguments(**defaults | SHORT | fields))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    served = Server(server)
    try:
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.005)


class Held(list):
    """The rows of each forward pass of a model, which waits before every pass that is not allowed yet."""

    def __init__(self, encode, passes):
        super().__init__()
        self.encode, self.is_open = encode, False
        self.allowed = threading.Semaphore(passes)

    def __call__(self, *args, **kwargs):
        self.append(len(args[0]))
        assert self.is_open or self.allowed.acquire(timeout=SECONDS)
        return self.encode(*args, **kwargs)

    def allow(self, passes):
        self.allowed.release(passes)

    def allow_all(self):
        self.is_open = True
        self.allow(1)


@contextmanager
def held(model, passes=0):
    """Let the model run so many forward passes, then hold it until the context is left."""
    encode = model.encode
    model.encode = waiting = Held(encode, passes)
    try:
        yield waiting
    finally:
        waiting.allow_all()
        model.encode = encode


class Reference:
    """Answers by `generate` of the model, one question at a time."""

    def __init__(self, checkpoint):
        self.model = HierBD3LMForBlockDiffusion.from_pretrained(checkpoint).eval()
        self.tokenizer = load_tokenizer(checkpoint)

    def __call__(self, question, **settings):
        inputs = self.tokenizer(question, return_tensors="pt")
        output = self.model.generate(**inputs, **SHORT | settings)
        pad = self.model.config.pad_token_id
        plan, execution = (
            [token for token in ids[0].tolist() if token != pad] for ids in (output.plan, output.execution)
        )
        return {
            "plan": self.tokenizer.decode(plan, skip_special_tokens=True),
            "execution": self.tokenizer.decode(execution, skip_special_tokens=True),
            "finish_reason": "stop" if output.finished[0] else "length",
            "prompt_tokens": inputs["input_ids"].shape[1],
            "reasoning_tokens": len(plan),
            "completion_tokens": len(plan) + len(execution),
            "num_forward_passes": int(output.num_forward_passes[0]),
        }


def read_chat(completion):
    """The reply to a chat, in the form of [`Reference`]."""
    (choice,) = completion.choices
    texts = {"plan": choice.message.reasoning_content, "execution": choice.message.content}
    return texts | {"finish_reason": choice.finish_reason} | read_usage(completion.usage)


def read_usage(usage):
    counts = {name: getattr(usage, name) for name in ("prompt_tokens", "completion_tokens", "num_forward_passes")}
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return counts | {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens}


def read_stream(chunks):
    """The streamed reply to a chat with usage, in the form of [`Reference`], and its pieces."""
    texts, pieces, reasons, usage = {"plan": "", "execution": ""}, [], [], None
    for chunk in chunks:
        if not chunk.choices:
            usage = chunk.usage
            continue
        (choice,) = chunk.choices
        for segment, name in (("plan", "reasoning_content"), ("execution", "content")):
            if piece := getattr(choice.delta, name, None):
                texts[segment] += piece
                pieces.append((segment, piece))
        reasons.append(choice.finish_reason)
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return texts | {"finish_reason": reasons[-1]} | read_usage(usage), pieces
