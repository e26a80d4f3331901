"""The twelve tensors of a routed expert in a DeepSeek-V4 NVFP4 checkpoint: names, types, shapes.

``{layer}.ffn.experts.{e}.w{1,2,3}.{weight,weight_scale,weight_scale_2,input_scale}``, as ModelOpt exports them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvfp4_megamoe.errors import CheckpointError

BLOCK = 16
GATE, DOWN, UP = "w1", "w2", "w3"
PROJECTIONS = (GATE, DOWN, UP)

WEIGHT, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE = "weight", "weight_scale", "weight_scale_2", "input_scale"
DTYPES = {
    WEIGHT: torch.uint8,
    BLOCK_SCALE: torch.float8_e4m3fn,
    GLOBAL_SCALE: torch.float32,
    INPUT_SCALE: torch.float32,
}
HEADER_DTYPES = {WEIGHT: "U8", BLOCK_SCALE: "F8_E4M3", GLOBAL_SCALE: "F32", INPUT_SCALE: "F32"}
MEANING = {
    WEIGHT: "packed E2M1 codes",
    BLOCK_SCALE: "a UE4M3 scale for each 16 columns",
    GLOBAL_SCALE: "the projection's global scale",
    INPUT_SCALE: "the calibrated global scale of its input",
}
REEXPORT = "Download the file again, or export the checkpoint again with ModelOpt."


class ExpertTensor(NamedTuple):
    """Which tensor a name stands for."""

    expert: int
    projection: str
    kind: str


def parse(name: str) -> ExpertTensor | None:
    """Read the part of a name after ``...experts.``, such as ``17.w1.weight_scale``; None if it is no expert tensor."""
    expert, _, rest = name.partition(".")
    projection, _, kind = rest.partition(".")
    # Only the plain spelling of a number: "07" and "7" must not become the same expert.
    if projection not in PROJECTIONS or kind not in DTYPES or not expert.isdecimal() or str(int(expert)) != expert:
        return None
    return ExpertTensor(int(expert), projection, kind)


def shape_of(projection: str, kind: str, hidden: int, intermediate: int) -> tuple[int, ...]:
    """Shape of an expert tensor; ``()`` for the scalars, which may also be stored as ``(1,)``."""
    rows, columns = (hidden, intermediate) if projection == DOWN else (intermediate, hidden)
    if kind == WEIGHT:
        return rows, columns // 2
    return (rows, columns // BLOCK) if kind == BLOCK_SCALE else ()


def require_blocks(what: str, hidden: int, intermediate: int) -> None:
    """Refuse a geometry whose columns do not divide into scale blocks.

    Raises:
        CheckpointError: hidden or intermediate size is not a multiple of 16.
    """
    for name, size in (("hidden size", hidden), ("MoE intermediate size", intermediate)):
        if size <= 0 or size % BLOCK:
            raise CheckpointError(
                f"{what}: the {name} is {size}; expected a multiple of {BLOCK}, because NVFP4 scales blocks of {BLOCK} "
                "columns. Correct the configuration, or serve a checkpoint that was quantized for this geometry."
            )


def fault(tensor: str, file: str, found: str, expected: str, remedy: str = REEXPORT) -> CheckpointError:
    """The error for one tensor, in one form everywhere: what it is, where it is, what was expected, what to do."""
    return CheckpointError(f"{tensor} in {file}: {found}; expected {expected}. {remedy}")
