"""The packed weight layout on the CPU: every weight comes back exactly, and each planted fault is noticed."""

from __future__ import annotations

import pytest
import torch
from nvfp4_megamoe.backends.sm90 import layout
from nvfp4_megamoe.numerics import nvfp4

ROWS, K = 256, 192


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
    expected = nvfp4.dequantize(packed, scale, torch.tensor(2.0**-8))
    gate_up = True
    if fault == "swapped nibbles":
        packed = (packed >> 4) | (packed << 4)
    elif fault == "mask":
        monkeypatch.setattr(layout, "SHARED_MASK", layout.SHARED_MASK ^ 0x8)
    values, scales = layout.pack_values(packed, scale, gate_up), layout.pack_scales(scale, gate_up)
    monkeypatch.undo()
    if fault == "lost scale block":
        scales[17] = 0 if scales[17] else 80
    elif fault == "gate for up":
        gate_up = False
    assert not torch.equal(layout.decode(values, scales, ROWS, K, gate_up), expected)


def test_words_of_a_unit_use_every_bit_once() -> None:
    masks = [
        layout._rotl(torch.tensor(layout.PAIR_MASK), m - 6).item() for m in (*layout.FIRST_WORD, *layout.SECOND_WORD)
    ]
    fourth = [layout._rotl(torch.tensor(layout.PAIR_MASK), m - 6).item() for m in layout.FOURTH_PAIRS]
    first, second = masks[:3], masks[3:]
    shared = layout.SHARED_MASK
    assert sum(first) + shared == layout.WORD
    assert sum(second) + (sum(fourth) & ~shared) == layout.WORD
    assert sum(fourth) & shared == shared
