"""Requests that bring every run-time compiler of a DeepSeek-V4 server to the shapes it will see while it serves.

What the kernels are specialized by, in vLLM 0.32 on a Hopper GPU: mHC's TileLang kernels by the number of K splits,
which changes with the number of blocks of 64 tokens in a batch until these fill the GPU; Triton's metadata kernels by
arguments that are 1 or divisible by 16, and by powers of two above the number of requests; CUDA graphs by the padded
batch, which start-up captures; everything above the largest graph runs eagerly.
"""

from __future__ import annotations

BLOCK = 64
FINE_TOKENS = 68 * BLOCK  # from here on mHC has one split: 132 multiprocessors over 67 blocks or more
COARSE_STEP = 1024
COARSE_STRIDE = 8
DECODE_TOKENS = 4

Group = list[tuple[int, int]]


def plan(max_batched_tokens: int, max_sequences: int, max_length: int) -> list[Group]:
    """Groups of (prompt tokens, output tokens) to send together, one group after another.

    Args:
        max_batched_tokens: of a step; longer prompts are cut into chunks of it.
        max_sequences: running at once.
        max_length: prompt and output of one sequence together.

    Raises:
        ValueError: an argument is too small for a request.
    """
    if max_length < 2 or max_sequences < 1 or max_batched_tokens < 1:
        raise ValueError(
            f"max_batched_tokens {max_batched_tokens}, max_sequences {max_sequences} and max_length {max_length}: "
            "expected at least 1, 1 and 2"
        )
    short = max(1, min(24, max_length - DECODE_TOKENS))
    output = min(DECODE_TOKENS, max_length - short)
    groups = [[(short, output)] * count for count in batch_sizes(max_sequences)]
    # Prefills of several requests in one step, beside others that decode.
    mixed = [300, 5, 64, 1500, 17, 128, 2, 700]
    groups.append([(min(n, max_length - output), output) for n in mixed[:max_sequences]])
    # Coarse first, so that a pass that is cut short has seen every range.
    lengths = prefill_lengths(max_batched_tokens, max_length)
    coarse = lengths[::COARSE_STRIDE]
    return groups + [[(length, 1)] for length in [*coarse, *sorted(set(lengths) - set(coarse))]]


def prefill_lengths(max_batched_tokens: int, max_length: int) -> list[int]:
    """Prompt lengths: every block of 64 tokens up to where nothing changes any more, then coarser, then cut prompts."""
    longest = max_length - 1
    step = min(max_batched_tokens, longest)
    lengths = {1, 2, 3, 15, 16, 17}
    for index, start in enumerate(range(0, min(step, FINE_TOKENS), BLOCK)):
        lengths.add(start + (48 if index % 2 else 33))  # divisible by 16 and not, in turn
    lengths.update(range(FINE_TOKENS, step, COARSE_STEP))
    lengths.update({step - 1, step})
    lengths.update(max_batched_tokens + extra for extra in (1, 17, BLOCK, max_batched_tokens))
    return sorted(length for length in lengths if 1 <= length <= longest)


def batch_sizes(max_sequences: int) -> list[int]:
    """Numbers of sequences that decode together: all up to 8, then in steps that grow with the number, and the most."""
    sizes, size = [], 1
    while size < max_sequences:
        sizes.append(size)
        size += 1 if size < 8 else 8 if size < 64 else 32
    return [*sizes, max_sequences]
