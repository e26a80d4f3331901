"""The OpenAI API of the demo server, through the official client."""

from __future__ import annotations

import json
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from .support import NAME, Server, post, prompt_tokens


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0, timeout=120)


def complete(client: openai.OpenAI, prompt: str | list[int] = "hello world", **options: object):
    arguments = {"model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(**arguments)


def test_models_names_the_served_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


def test_completion_is_greedy_and_counts_its_tokens(client: openai.OpenAI) -> None:
    first = complete(client, extra_body={"ignore_eos": True})
    again = complete(client, extra_body={"ignore_eos": True})
    assert first.usage.completion_tokens == 12
    assert first.choices[0].finish_reason == "length"
    assert first.choices[0].text == again.choices[0].text


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens > 1
    assert 1 <= answer.usage.completion_tokens <= 8


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    whole = complete(client, extra_body={"ignore_eos": True}).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(client, stream=True, extra_body={"ignore_eos": True})]
    assert len(pieces) > 2
    assert "".join(pieces) == whole


def test_chat_streaming(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert len(chunks) > 2
    assert chunks[-1].choices[0].finish_reason == "length"


def test_log_probabilities_belong_to_the_tokens(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=3, extra_body={"ignore_eos": True}).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen <= 0
        assert chosen >= max(top.values()) - 1e-4, "greedy decoding takes the most probable token"


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=32, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[len(text) // 2]
    stopped = complete(client, max_tokens=32, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


def test_eight_requests_at_once(client: openai.OpenAI) -> None:
    prompts = [f"request number {number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: complete(client, p, max_tokens=24, extra_body={"ignore_eos": True}), prompts))
    assert [answer.usage.completion_tokens for answer in answers] == [24] * 8


def test_prompts_shorter_than_a_compressed_row_beside_a_long_context(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(4) as pool:
        long = pool.submit(complete, client, prompt_tokens(2500), max_tokens=40, extra_body={"ignore_eos": True})
        short = [
            pool.submit(complete, client, [11, 12, 13][:count], max_tokens=4, extra_body={"ignore_eos": True})
            for count in (1, 2, 3)
        ]
        assert [answer.result().usage.completion_tokens for answer in short] == [4] * 3
        assert long.result().usage.completion_tokens == 40


BAD_REQUESTS = {
    "unknown model": ("/v1/completions", {"model": "no-such-model", "prompt": "x"}, 404),
    "prompt beyond the context": ("/v1/completions", {"model": NAME, "prompt": [9] * 5000, "max_tokens": 1}, 400),
    "token outside the vocabulary": ("/v1/completions", {"model": NAME, "prompt": [10**6], "max_tokens": 1}, 400),
    "negative max_tokens": ("/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": -1}, 400),
    "temperature of the wrong type": ("/v1/completions", {"model": NAME, "prompt": "x", "temperature": "hot"}, 400),
    "no messages": ("/v1/chat/completions", {"model": NAME, "max_tokens": 1}, 400),
    "messages of the wrong type": ("/v1/chat/completions", {"model": NAME, "messages": "hello", "max_tokens": 1}, 400),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused_with_a_message_and_the_server_lives(server: Server, client, case: str) -> None:
    path, body, status = BAD_REQUESTS[case]
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server.base_url + path, body)
    answer = json.loads(refused.value.read())
    assert refused.value.code == status
    assert answer["error"]["message"]
    assert complete(client, max_tokens=2).usage.completion_tokens >= 1, "the server must answer after a bad request"
