"""Requests to a server under measurement: tokens, log-probabilities, and the times of many requests at once.

Prompts are lists of token ids of the demo tokenizer's ordinary tokens, different for every seed, so that no prefix is
shared and no text has to be encoded.
"""

from __future__ import annotations

import asyncio
import functools
import json
import statistics
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import aiohttp

from serving_bench.probe import headers
from serving_bench.server import ServerError

FIRST_TOKEN, ORDINARY_TOKENS = 7, 490
REQUEST_TIMEOUT_S = 570


def prompt(count: int, seed: int = 0) -> list[int]:
    """``count`` ordinary tokens, different for every seed."""
    return [
        FIRST_TOKEN + (seed * 101 + index * (37 + seed % 7) + index // 11) % ORDINARY_TOKENS for index in range(count)
    ]


@functools.cache
def model(base_url: str, key: str | None = None) -> dict:
    """What a server says of the model that it serves: ``id``, ``max_model_len`` and more.

    Raises:
        ServerError: it does not answer.
    """
    try:
        request = urllib.request.Request(f"{base_url}/v1/models", headers=headers(key))
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["data"][0]
    except OSError as error:
        raise ServerError(f"{base_url}/v1/models: {error}") from error


def complete(base_url: str, body: dict, timeout_s: float = REQUEST_TIMEOUT_S) -> dict:
    """One greedy completion; returns its choice.

    Raises:
        ServerError: the server refused or dropped the request; its answer is in the message.
    """
    payload = json.dumps({"model": model(base_url)["id"], "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{base_url}/v1/completions", payload, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        raise ServerError(f"{base_url} answered {error.code}: {error.read()[:500].decode(errors='replace')}") from error
    except OSError as error:
        raise ServerError(f"{base_url} dropped a request: {error}") from error


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation: its tokens, and for each position the log-probabilities of the likeliest few by token."""

    tokens: list[str]
    top: list[dict[str, float]]


def greedy(base_url: str, tokens: list[int], count: int) -> Greedy:
    """Continue ``tokens`` by ``count`` tokens."""
    body = {
        "prompt": tokens,
        "max_tokens": count,
        "ignore_eos": True,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,
    }
    found = complete(base_url, body)["logprobs"]
    return Greedy(found["tokens"], found["top_logprobs"])


def prompt_logprobs(base_url: str, tokens: list[int]) -> list[float]:
    """Log-probability of each token but the first, given those before it."""
    choice = complete(base_url, {"prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0})
    entries = choice["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries, tokens[1:], strict=True)]


@dataclass(frozen=True)
class Timing:
    """Times of one streamed request, in seconds after it was sent."""

    first: float
    last: float
    tokens: int


async def _stream(
    session: aiohttp.ClientSession, base_url: str, tokens: list[int], count: int, key: str | None
) -> Timing:
    body = {"model": model(base_url, key)["id"], "prompt": tokens, "max_tokens": count, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    first = last = produced = 0
    async with session.post(f"{base_url}/v1/completions", json=body, headers=headers(key)) as response:
        if response.status != 200:
            raise ServerError(f"{base_url} answered {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ServerError(f"{base_url}: {event['error']}")
            if event.get("usage"):
                produced = event["usage"]["completion_tokens"]
            if event["choices"]:
                last = time.perf_counter() - began
                first = first or last
    if produced != count:
        raise ServerError(f"{base_url}: asked for {count} tokens, got {produced}")
    return Timing(first, last, produced)


async def _together(base_url: str, prompts: list[list[int]], count: int, key: str | None) -> tuple[float, list[Timing]]:
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        timings = await asyncio.gather(*(_stream(session, base_url, tokens, count, key) for tokens in prompts))
        return time.perf_counter() - began, list(timings)


def together(base_url: str, prompts: list[list[int]], count: int, key: str | None = None) -> tuple[float, list[Timing]]:
    """Send all ``prompts`` at once, each for ``count`` tokens; returns the seconds in all and each request's times."""
    try:
        return asyncio.run(_together(base_url, prompts, count, key))
    except (TimeoutError, aiohttp.ClientError) as error:
        raise ServerError(f"{base_url} dropped a request: {type(error).__name__} {error}") from error


def decode(base_url: str, sequences: int, prompt_tokens: int, tokens: int, seed: int = 0) -> dict[str, float]:
    """Time per output token of ``sequences`` requests at once.

    A request's time per output token is its time from first to last token over the tokens between; the median over the
    requests is given, and output tokens per second while all of them decode.
    """
    prompts = [prompt(prompt_tokens, seed * 1000 + number) for number in range(sequences)]
    seconds, timings = together(base_url, prompts, tokens)
    each = [(t.last - t.first) / (t.tokens - 1) for t in timings]
    median = statistics.median(each)
    return {
        "sequences": sequences,
        "prompt_tokens": prompt_tokens,
        "output_tokens": tokens,
        "ms_per_token": 1e3 * median,
        "first_token_ms": 1e3 * statistics.median(t.first for t in timings),
        "output_tokens_s": sequences / median,
        "overall_tokens_s": sequences * tokens / seconds,
    }


def prefill(base_url: str, prompt_tokens: int, repeats: int = 3, seed: int = 0) -> dict[str, float]:
    """Prompt tokens per second of lone requests for one token; the median of ``repeats``."""
    taken = []
    for repeat in range(repeats):
        seconds, _ = together(base_url, [prompt(prompt_tokens, seed * 1000 + 500 + repeat)], 1)
        taken.append(seconds)
    return {"prompt_tokens": prompt_tokens, "tokens_s": prompt_tokens / statistics.median(taken)}
