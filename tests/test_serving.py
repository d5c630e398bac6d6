"""The server gives a client of OpenAI's API what `generate` gives."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from hierbd3lm.modeling_hierbd3lm import HierBD3LMForBlockDiffusion
from hierbd3lm.serving.engine import Delta, Job
from hierbd3lm.settings_hierbd3lm import HierBD3LMGenerationConfig

from .test_chat_template import TEMPLATE, make_chat_tokenizer
from .tiny_evaluation import SHORT
from .tiny_serving import NAME, QUESTIONS, Reference, held, read_chat, read_stream, read_usage, serving, wait_until
from .tiny_tokenizer import make_config_for

SETTINGS = [
    {},
    {"sampler": "first_hitting"},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"sampler": "confidence", "threshold": 0.2, "tokens_per_step": 2},
]


def as_request(settings):
    """Settings as arguments of the client: OpenAI's own beside those in the body's other fields."""
    own = {name: value for name, value in settings.items() if name in ("temperature", "top_p", "seed")}
    return own | {"extra_body": {name: value for name, value in settings.items() if name not in own}}


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(checkpoint) as server:
        yield server


@pytest.fixture(scope="module")
def expected(checkpoint):
    return Reference(checkpoint)


# Chats


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_chat_is_answered_as_generate_answers(server, expected, settings):
    for question in QUESTIONS[:2]:
        answer = expected(question, **settings)
        assert answer["plan"] and answer["execution"]
        assert read_chat(server.ask(question, **as_request(settings))) == answer


@pytest.mark.parametrize("settings", SETTINGS)
def test_streamed_pieces_join_to_the_same_texts(server, expected, settings):
    request = as_request(settings) | {"stream": True, "stream_options": {"include_usage": True}}
    answer, pieces = read_stream(server.ask(QUESTIONS[0], **request))
    assert answer == expected(QUESTIONS[0], **settings)
    assert [segment for segment, _ in pieces] == sorted((s for s, _ in pieces), key=["plan", "execution"].index)
    assert len(pieces) >= 4  # two blocks of each segment


def test_a_limit_of_tokens_ends_the_answer(server, expected):
    answer = expected(QUESTIONS[0], max_new_tokens=11)
    for name in ("max_tokens", "max_completion_tokens"):
        assert read_chat(server.ask(QUESTIONS[0], **{name: 11})) == answer
    assert read_chat(server.ask(QUESTIONS[0], extra_body={"max_new_tokens": 11})) == answer
    assert answer["finish_reason"] == "length"


def test_a_given_plan_is_executed_and_counts_as_prompt(server, expected):
    plan_ids = expected.tokenizer("Ann has", add_special_tokens=False, return_tensors="pt").input_ids
    answer = expected(QUESTIONS[0], plan_ids=plan_ids, stage="execution", max_plan_len=None)
    reply = read_chat(server.ask(QUESTIONS[0], extra_body={"plan": "Ann has"}))
    assert (reply["plan"], reply["execution"]) == ("Ann has", answer["execution"])
    assert reply["prompt_tokens"] == answer["prompt_tokens"] + plan_ids.shape[1]
    assert (reply["reasoning_tokens"], reply["num_forward_passes"]) == (0, answer["num_forward_passes"])


def test_events_are_those_of_openai(server):
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "stream": True}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    first, *_, last = (json.loads(event.removeprefix("data: ")) for event in events[:-2])
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] in ("stop", "length") and "usage" not in last


def test_a_character_is_sent_when_all_of_its_bytes_are_there():
    events = []
    job = Job(None, HierBD3LMGenerationConfig(), events.append, streams=True)
    for text in ("a", "a\ufffd", "a\ufffd\ufffd", "aé", "aé"):
        job.show({"plan": text}, is_last=False)
    job.show({"plan": "aé\ufffd"}, is_last=True)
    assert events == [Delta("plan", "a"), Delta("plan", "é"), Delta("plan", "\ufffd")]


# Completions


def test_a_completion_is_the_execution_with_the_plan_beside_it(server, expected):
    ids = expected.tokenizer(QUESTIONS[0])["input_ids"]
    answer = expected(QUESTIONS[0])
    for prompt in (QUESTIONS[0], ids):
        reply = server.client.completions.create(model=NAME, prompt=prompt)
        (choice,) = reply.choices
        texts = {"plan": choice.reasoning_content, "execution": choice.text, "finish_reason": choice.finish_reason}
        assert texts | read_usage(reply.usage) == answer


def test_several_prompts_have_a_choice_each(server, expected):
    answers = [expected(question) for question in QUESTIONS]
    reply = server.client.completions.create(model=NAME, prompt=QUESTIONS)
    assert [choice.index for choice in reply.choices] == list(range(len(QUESTIONS)))
    assert [choice.text for choice in reply.choices] == [answer["execution"] for answer in answers]
    assert reply.usage.num_forward_passes == sum(answer["num_forward_passes"] for answer in answers)
    texts = [""] * len(QUESTIONS)
    for chunk in server.client.completions.create(model=NAME, prompt=QUESTIONS, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [answer["execution"] for answer in answers]


# Batches


def test_ragged_requests_that_wait_are_answered_together(server, expected):
    answers = [expected(question) for question in QUESTIONS]
    server.batches.clear()
    with ThreadPoolExecutor(12) as pool:
        with held(server.model):
            first = pool.submit(server.ask, "2")
            wait_until(lambda: server.engine.running)
            others = [pool.submit(server.ask, question) for question in QUESTIONS]
            warm = [pool.submit(server.ask, question, temperature=0.5) for question in QUESTIONS[:2]]
            seeded = [pool.submit(server.ask, question, temperature=0.5, seed=1) for question in QUESTIONS[:2]]
            wait_until(lambda: server.engine.num_waiting == 9)
        replies = [read_chat(reply.result()) for reply in others]
        [reply.result() for reply in (first, *warm)]
        drawn = [read_chat(reply.result()) for reply in seeded]
    assert replies == answers
    assert server.batches[0] == 1 and sorted(server.batches[1:]) == [1, 1, 2, 5]
    assert drawn == [expected(question, temperature=0.5, seed=1) for question in QUESTIONS[:2]]


def test_clients_that_ask_again_are_answered_in_one_batch(server, monkeypatch):
    """Not in two alternating ones: that of the first question, and that of those that came meanwhile."""
    monkeypatch.setattr(server.engine, "patience", 1000.0)
    server.batches.clear()

    def ask(number):
        return [server.ask(question) for question in QUESTIONS[: 4 if number == 0 else 3]]

    with ThreadPoolExecutor(4) as pool:
        with held(server.model):
            clients = [pool.submit(ask, 0)]
            wait_until(lambda: server.engine.running)
            clients += [pool.submit(ask, number) for number in range(1, 4)]
            wait_until(lambda: server.engine.num_waiting == 3)
        assert all(client.result() for client in clients)
    assert server.batches == [1, 4, 4, 4]


# Models with a chat template


@pytest.fixture
def chat_server(tmp_path):
    tokenizer = make_chat_tokenizer()
    config = make_config_for(tokenizer, question_len=96, plan_len=8, execution_len=8, chat_template=True)
    torch.manual_seed(0)
    HierBD3LMForBlockDiffusion(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with serving(tmp_path) as server:
        yield server, Reference(tmp_path)


def test_messages_go_through_the_chat_template(chat_server):
    server, reference = chat_server
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]},
        {"role": "assistant", "content": "5", "reasoning_content": "Add."},
        {"role": "user", "content": "And 4 + 4?"},
    ]
    assert "message['role']" in TEMPLATE
    for chosen in (messages, messages[3:]):
        texts = [
            {"role": m["role"], "content": "2 + 3?" if isinstance(m["content"], list) else m["content"]}
            for m in chosen
        ]
        ids = reference.tokenizer.apply_chat_template(
            texts, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        output = reference.model.generate(ids, **SHORT)
        reply = server.client.chat.completions.create(model=NAME, messages=chosen)
        assert reply.usage.prompt_tokens == ids.shape[1]
        assert reply.choices[0].message.content == reference.tokenizer.decode(
            output.execution[0], skip_special_tokens=True
        )
    with pytest.raises(openai.BadRequestError, match="must end with one of the role 'user', but got 'assistant'"):
        server.client.chat.completions.create(model=NAME, messages=messages[:3])
    text = reference.tokenizer.apply_chat_template(messages[3:], add_generation_prompt=True, tokenize=False)
    raw = server.client.completions.create(model=NAME, prompt=text.removeprefix("<|bos|>"))
    assert raw.choices[0].text == reply.choices[0].message.content


# Other endpoints


def test_the_model_is_listed_with_its_limits(server):
    (model,) = server.client.models.list().data
    assert (model.id, model.question_len, model.plan_len) == (NAME, 96, 32)
    assert server.client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        server.client.models.retrieve("other")


def test_metrics_count_requests_tokens_and_passes(checkpoint):
    with serving(checkpoint) as server:
        usage = read_usage(server.ask(QUESTIONS[0]).usage)
        with pytest.raises(openai.BadRequestError):
            server.ask("1" * 200)
        assert server.metric("requests_total", endpoint="/v1/chat/completions", status="200") == 1
        assert server.metric("requests_total", endpoint="/v1/chat/completions", status="400") == 1
        assert server.metric("tokens_total", segment="question") == usage["prompt_tokens"]
        assert server.metric("tokens_total", segment="plan") == usage["reasoning_tokens"]
        assert server.metric("forward_passes_total") == usage["num_forward_passes"]
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
            assert b"hierbd3lm_batch_rows_bucket" in response.read()
        with urllib.request.urlopen(f"{server.url}/health", timeout=60) as response:
            assert json.loads(response.read()) == {"status": "ok"}


def test_settings_of_the_server_are_those_of_requests_that_give_none(checkpoint, expected):
    with serving(checkpoint, sampler="first_hitting") as server:
        assert read_chat(server.ask(QUESTIONS[0])) == expected(QUESTIONS[0], sampler="first_hitting")
        other = read_chat(server.ask(QUESTIONS[0], extra_body={"sampler": "confidence"}))
        assert other == expected(QUESTIONS[0], sampler="confidence")
