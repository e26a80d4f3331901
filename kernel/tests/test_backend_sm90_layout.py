"""The packed weight layout on the CPU: every weight comes back exactly, and each planted fault is noticed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.backends.sm90 import build, layout
from nvfp4_megamoe.numerics import nvfp4

ROWS, K = 256, 384


def random_weights(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of every kind: all 16 codes, zero, subnormal and largest scales."""
    packed = torch.randint(0, 256, (ROWS, K // 2), generator=rng, dtype=torch.uint8)
    bits = torch.randint(0, 0x7F, (ROWS, K // 16), generator=rng, dtype=torch.uint8)
    bits[::7, ::3], bits[1::5, 1::2], bits[3, 3] = 0, torch.randint(1, 8, (), generator=rng), 0x7E
    return packed, bits.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("gate_up", [True, False])
def test_decoded_weights_are_exact(rng: torch.Generator, gate_up: bool) -> None:
    packed, scale = random_weights(rng)
    values, scales = layout.pack_values(packed, scale, gate_up), layout.pack_scales(scale, gate_up)
    assert values.numel() == packed.numel() and scales.numel() == scale.numel()
    expected = nvfp4.dequantize(packed, scale, torch.tensor(2.0**-8))
    assert torch.equal(layout.decode(values, scales, ROWS, K, gate_up), expected)


def test_nan_scale_stays_nan(rng: torch.Generator) -> None:
    packed, scale = random_weights(rng)
    packed |= 0x11  # no value is zero
    scale.view(torch.uint8)[5, 2] = 0x7F
    out = layout.decode(layout.pack_values(packed, scale, False), layout.pack_scales(scale, False), ROWS, K, False)
    assert out[5, 32:48].isnan().all() and out.isnan().sum() == 16


@pytest.mark.parametrize("fault", ["swapped nibbles", "lost scale block", "gate for up", "mask"])
def test_planted_faults_are_noticed(rng: torch.Generator, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scale = random_weights(rng)
    scale.view(torch.uint8).clamp_(min=8)  # a lost scale that was zero would be none
    expected = nvfp4.dequantize(packed, scale, torch.tensor(2.0**-8))
    gate_up = True
    if fault == "swapped nibbles":
        packed = (packed >> 4) | (packed << 4)
    elif fault == "mask":
        monkeypatch.setattr(layout, "SHARED_MASK", layout.SHARED_MASK ^ 0x8)
    values, scales = layout.pack_values(packed, scale, gate_up), layout.pack_scales(scale, gate_up)
    monkeypatch.undo()
    if fault == "lost scale block":
        scales[17] = 0
    elif fault == "gate for up":
        gate_up = False
    assert not torch.equal(layout.decode(values, scales, ROWS, K, gate_up), expected)


def test_words_of_a_block_use_every_bit_once() -> None:
    first, second, both = (
        [layout._rotl(torch.tensor(layout.PAIR_MASK), layout.PAIR_AT[i] - 6).item() for i in pairs]
        for pairs in (layout.FIRST_WORD, layout.SECOND_WORD, layout.BOTH_WORDS)
    )
    shared = layout.SHARED_MASK
    assert sum(first) + shared == layout.WORD
    assert sum(second) + (sum(both) & ~shared) == layout.WORD
    assert sum(both) & shared == shared


@pytest.mark.parametrize("gate_up", [True, False])
def test_decoded_e4m3_weights_are_rounded_once(rng: torch.Generator, gate_up: bool) -> None:
    packed, scale = random_weights(rng)
    values, scales = layout.pack_values(packed, scale, gate_up), layout.pack_scales(scale, gate_up)
    expected = nvfp4.dequantize(packed, scale, torch.tensor(2.0**-3)).to(torch.float8_e4m3fn).float()
    out = layout.decode_e4m3(values, scales, ROWS, K, gate_up)
    assert torch.equal(out, expected) and out.abs().max() <= 336


EMULATION = """
#include <cstdio>
#include "e4m3.cuh"
// For every code of a scale its 8 magnitudes; then decoded blocks of the words in standard input, by a table of 0 to 7.
int main() {
    for (int code = 0; code < sm90::kScaleCodes; ++code)
        for (int m = 0; m < 8; ++m) std::printf("%a\\n", sm90::scaled_magnitude(code, m));
    unsigned w0, w1;
    while (std::scanf("%u %u", &w0, &w1) == 2) {
        uint32_t out[4];
        sm90::decode_block_e4m3(w0, w1, 0x03020100u, 0x07060504u, out);
        std::printf("%u %u %u %u\\n", out[0], out[1], out[2], out[3]);
    }
}
"""


def test_the_device_functions_on_the_host(rng: torch.Generator, tmp_path: Path) -> None:
    """csrc/e4m3.cuh itself, compiled for the CPU: every scale, and every code at every place of a block."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    (tmp_path / "emulation.cpp").write_text(EMULATION)
    command = [compiler, "-std=c++17", "-O1", "-I", str(build.SOURCES), "-o", str(tmp_path / "emulation")]
    subprocess.run([*command, str(tmp_path / "emulation.cpp")], check=True)
    codes = torch.randint(0, 16, (512, 16), generator=rng)
    for place in range(16):
        codes[16 * place : 16 * place + 16, place] = torch.arange(16)
    packed = (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    # One k64 of 512 / 4 = 128 rows, so that block b of row r is row 4 * r + b of `codes`; a second k64 is zero.
    rows = torch.cat((packed.view(128, 32), torch.zeros(128, 32, dtype=torch.uint8)), 1)
    scale = torch.full((128, 8), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    first, second = (w[:, 0] for w in layout._words(layout.pack_values(rows, scale, False), 128))
    words = torch.stack((first, second), -1).permute(0, 1, 2, 5, 3, 4, 6).reshape(512, 2)
    run = subprocess.run(
        [tmp_path / "emulation"], input="\n".join(f"{a} {b}" for a, b in words.tolist()), capture_output=True, text=True
    )
    lines = run.stdout.splitlines()
    magnitudes = torch.tensor([float.fromhex(x) for x in lines[:2048]]).view(256, 8)
    e4m3 = torch.arange(0x80, dtype=torch.uint8).view(torch.float8_e4m3fn)
    magnitude_codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0, 0, 0, 0]], dtype=torch.uint8)
    for bits in range(0x80):
        one = layout.pack_scales(e4m3[bits].repeat(128, 8), False)[0].item()
        expected = nvfp4.dequantize(magnitude_codes, e4m3[bits].view(1, 1), torch.tensor(0.125))[0, :8]
        if bits:  # a scale of zero has only zeros
            torch.testing.assert_close(magnitudes[one], expected, rtol=0, atol=0, equal_nan=True)
    decoded = torch.tensor([[int(x) for x in line.split()] for line in lines[2048:]])
    for place in range(16):
        half, pair, j = place // 8, (place % 8) // 2, place % 2
        byte = (decoded[:, 2 * half + j] >> (8 * pair)) & 255
        assert torch.equal(byte, (codes[:, place] & 7) | ((codes[:, place] & 8) << 4)), place


def test_units_side_by_side_keep_each_block_whole(rng: torch.Generator) -> None:
    units, kblocks, size = 6, 3, 5
    blocks = torch.randint(0, 256, (units, kblocks, size), generator=rng, dtype=torch.uint8)
    out = layout.side_by_side(blocks.flatten(), units * layout.UNIT_ROWS, kblocks * 128).view(-1, size)
    for unit in range(units):
        first = unit // 4 * 4
        for kb in range(kblocks):
            place = first * kblocks + kb * min(4, units - first) + unit - first
            assert torch.equal(out[place], blocks[unit, kb])
