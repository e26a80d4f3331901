"""Plain float64 loops for what each portable CPU operator computes, one token, one head, one value at a time."""

from __future__ import annotations

import math

import torch

BF16 = 2.0**-8  # half a unit in the last place of bfloat16, relative


def close(actual: torch.Tensor, expected, relative: float = 1e-5, absolute: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=relative, atol=absolute)


def e4m3_value(code: int) -> float:
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code & 0x80 else size


_POSITIVE = [e4m3_value(code) for code in range(127)]


def e4m3_code(value: float) -> int:
    """Nearest finite code; between two, the even one."""
    size = min(abs(value), 448.0)
    distance = [abs(size - candidate) for candidate in _POSITIVE]
    best = min(distance)
    code = min((c for c in range(127) if distance[c] == best), key=lambda c: c & 1)
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def bf16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).bfloat16())


def rotated(row: list[float], angles: torch.Tensor, inverse: bool = False) -> list[float]:
    """``row`` with its last len(angles) values turned in pairs; angles = cosines, then sines."""
    half = len(angles) // 2
    start = len(row) - 2 * half
    out = list(row)
    for i in range(half):
        cos, sin = float(angles[i]), float(angles[half + i]) * (-1 if inverse else 1)
        even, odd = row[start + 2 * i], row[start + 2 * i + 1]
        out[start + 2 * i], out[start + 2 * i + 1] = even * cos - odd * sin, even * sin + odd * cos
    return out


def rms_normed(row: list[float], eps: float) -> list[float]:
    inverse = 1 / math.sqrt(sum(v * v for v in row) / len(row) + eps)
    return [v * inverse for v in row]


def power_of_two(amax: float, floor: float) -> int:
    """Smallest e with 2**e >= max(amax / 448, floor), found by stepping."""
    want, exponent = max(amax / 448, floor), -60
    while 2.0**exponent < want:
        exponent += 1
    return exponent


def mla_row(nope: list[float], rope: list[float], flush: bool) -> tuple[list[int], list[float], list[int]]:
    """448 codes, 64 bfloat16 values and 8 scale bytes of one cache row."""
    codes, scales = [], []
    for group in range(7):
        values = [bf16(v) for v in nope[64 * group : 64 * group + 64]]
        exponent = power_of_two(max(abs(v) for v in values), 1e-4)
        for v in values:
            v /= 2.0**exponent
            codes.append((0x80 if math.copysign(1, v) < 0 else 0) if flush and abs(v) < 2**-6 else e4m3_code(v))
        scales.append(exponent + 127)
    return codes, [bf16(v) for v in rope], [*scales, 0]


def mla_read(cache: torch.Tensor, slot: int, block: int) -> list[float]:
    page, offset = divmod(slot, block)
    data = cache[page, 576 * offset : 576 * offset + 576]
    scale = cache[page, 576 * block + 8 * offset :][:8].tolist()
    nope = [e4m3_value(c) * 2.0 ** (scale[i // 64] - 127) for i, c in enumerate(data[:448].tolist())]
    return nope + data[448:].clone().view(torch.bfloat16).double().tolist()


def attend(query: list[float], rows: list[list[float]], sink: float, scale: float) -> list[float]:
    if not rows:
        return [0.0] * len(query)
    logits = [scale * sum(a * b for a, b in zip(query, row, strict=True)) for row in rows]
    top = max([*logits, sink])
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights) + math.exp(sink - top)
    return [sum(w * row[d] for w, row in zip(weights, rows, strict=True)) / total for d in range(len(query))]


def pooled(state: torch.Tensor, gather: list[int], ratio: int, dim: int) -> list[float]:
    """Each channel's softmax-weighted average over the window; rows past ``ratio`` use the second channels."""
    block, width = state.shape[1], state.shape[2] // 2
    out = []
    for d in range(dim):
        pairs = []
        for w, slot in enumerate(gather):
            if slot >= 0:
                row = state[slot // block, slot % block]
                channel = d + (dim if w >= ratio else 0)
                pairs.append((float(row[channel]), float(row[width + channel])))
        top = max(score for _, score in pairs)
        total = sum(math.exp(score - top) for _, score in pairs)
        out.append(sum(value * math.exp(score - top) for value, score in pairs) / total)
    return out


def sinkhorn(matrix: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    size = range(len(matrix))
    top = [max(row) for row in matrix]
    rows = [[math.exp(v - top[r]) for v in matrix[r]] for r in size]
    for step in range(iterations):
        for r in size:
            total = sum(rows[r])
            rows[r] = [v / total + eps for v in rows[r]] if step == 0 else [v / (total + eps) for v in rows[r]]
        for c in size:
            total = sum(rows[r][c] for r in size) + eps
            for r in size:
                rows[r][c] /= total
    return rows


def score(value: float, how: str) -> float:
    if how == "sigmoid":
        return 1 / (1 + math.exp(-value))
    return math.sqrt(math.log1p(math.exp(value)))
