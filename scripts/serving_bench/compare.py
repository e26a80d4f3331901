"""Whether two servers of the same weights say the same, up to rounding."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from serving_bench.client import Greedy, greedy, prompt, prompt_logprobs

# Two right implementations of W4A16 differ by the order of sums and by what bfloat16 does to a near-tie in the routing.
# Between this project's CPU kernels and transformers in float32 it is 0.03 on average; wrong scales give 0.3.
MEAN_LIMIT = 0.07
# Where two greedy continuations part, both tokens must be about equally likely.
PARTING_LIMIT = 0.25
# Through V4-Pro's 61 layers of random weights rounding grows until single values cannot be compared.
LEAST_CORRELATION = 0.5
PROMPTS = (37, 300, 1500)
CONTINUATION = 48


def answers(base_url: str) -> dict[str, list]:
    """Log-probabilities of three prompts and greedy continuations of them."""
    prompts = [prompt(count, seed) for seed, count in enumerate(PROMPTS)]
    return {
        "logprobs": [prompt_logprobs(base_url, tokens) for tokens in prompts],
        "greedy": [greedy(base_url, tokens, CONTINUATION) for tokens in prompts],
    }


def difference(mine: dict[str, list], reference: dict[str, list]) -> dict[str, object]:
    """Mean and largest absolute difference of log-probabilities, their correlation, and how far greedy texts agree.

    ``parting_gaps`` has, for each continuation that parts from the reference's, by how much the reference prefers its
    own token there; None where our token is not among its five likeliest. Compared up to there only: after it the two
    continue different texts.
    """
    pairs = [
        (a, b) for x, y in zip(mine["logprobs"], reference["logprobs"], strict=True) for a, b in zip(x, y, strict=True)
    ]
    gaps = [abs(a - b) for a, b in pairs]
    partings = [parting(x, y) for x, y in zip(mine["greedy"], reference["greedy"], strict=True)]
    return {
        "tokens_compared": len(gaps),
        "mean": statistics.fmean(gaps),
        "max": max(gaps),
        "correlation": _correlation(pairs),
        "greedy_equal_tokens": [at for at, _ in partings],
        "greedy_tokens": [len(y.tokens) for y in reference["greedy"]],
        "parting_gaps": [gap for (at, gap), y in zip(partings, reference["greedy"], strict=True) if at < len(y.tokens)],
    }


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's; None where one side says the same everywhere."""
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:
        return None


def parting(mine: Greedy, reference: Greedy) -> tuple[int, float | None]:
    """Index of the first different token, or the length, and how much the reference prefers its own token there."""
    for index, (a, b) in enumerate(zip(mine.tokens, reference.tokens, strict=True)):
        if a != b:
            top = reference.top[index]
            return index, top[b] - top[a] if a in top and b in top else None
    return len(reference.tokens), 0.0


def faults(
    found: dict[str, object], mean_limit: float = MEAN_LIMIT, parting_limit: float = PARTING_LIMIT
) -> Sequence[str]:
    """What in a difference is more than rounding; empty where nothing is."""
    wrong = []
    if not found["mean"] <= mean_limit:  # a NaN is wrong too
        wrong.append(f"log-probabilities differ by {found['mean']:.4f} on average, allowed {mean_limit}")
    for gap in found["parting_gaps"]:
        if gap is None or not gap <= parting_limit:
            by = "more than the five likeliest allow" if gap is None else f"{gap:.3f}"
            wrong.append(f"a greedy continuation parts where the reference prefers its token by {by}")
    return wrong
