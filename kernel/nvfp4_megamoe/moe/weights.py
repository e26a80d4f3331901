"""The weights of one rank's experts in one layer, as they are in memory, and the way there from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.errors import CheckpointError
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weight_checks import first_fault


@dataclass(frozen=True)
class ExpertWeights:
    """NVFP4 weights of E local experts in ModelOpt's layout, gate rows first, then up rows.

    A weight is ``e2m1 * block_scale * global``; gate and up each have their own global and input scale.
    H is the hidden size, I the intermediate size.

    Attributes:
        w13: uint8 [E, 2I, H / 2], two E2M1 codes a byte, low nibble first.
        w13_scale: float8_e4m3fn [E, 2I, H / 16].
        w13_global: float32 [E, 2], gate and up.
        w13_input_scale: float32 [E, 2], gate and up.
        w2: uint8 [E, H, I / 2].
        w2_scale: float8_e4m3fn [E, H, I / 16].
        w2_global: float32 [E].
        w2_input_scale: float32 [E].
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_global: torch.Tensor
    w13_input_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_global: torch.Tensor
    w2_input_scale: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden(self) -> int:
        return self.w13.shape[2] * 2

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2] * 2

    @classmethod
    def empty(
        cls, num_experts: int, hidden: int, intermediate: int, device: torch.device | str = "cpu"
    ) -> ExpertWeights:
        """Uninitialised tensors of the right types and shapes."""
        shapes = _shapes(num_experts, hidden, intermediate)
        return cls(**{name: torch.empty(shape, dtype=_DTYPES[name], device=device) for name, shape in shapes.items()})

    @classmethod
    def from_checkpoint(
        cls,
        tensors: Mapping[str, torch.Tensor],
        prefix: str,
        expert_ids: Sequence[int],
        geometry: MoEGeometry,
        source: str | Callable[[str], str],
    ) -> ExpertWeights:
        """Assemble one rank's experts from tensors named as in a DeepSeek-V4 NVFP4 checkpoint.

        Args:
            tensors: name to tensor; may hold more than this layer and this rank.
            prefix: of the layer's experts, such as ``layers.3.ffn.experts``.
            expert_ids: global ids of the local experts, in local order, without duplicates.
            geometry: of the layer on this rank; ``num_local_experts`` is the length of ``expert_ids``.
            source: file that holds the tensors, or a function from a tensor's name to its file; for messages.

        Returns:
            Weights with every value checked, copied to the device of the tensors.

        Raises:
            CheckpointError: a tensor is missing, unknown, of a wrong type or shape, or has values that no NVFP4
                expert may have; or K is not a multiple of 16.
            ValueError: ``expert_ids`` do not fit ``geometry``.
        """
        ids = list(expert_ids)
        if len(ids) != geometry.num_local_experts or len(set(ids)) != len(ids):
            raise ValueError(f"Expected {geometry.num_local_experts} different expert ids, got {ids}.")
        if any(not 0 <= e < geometry.num_experts for e in ids):
            raise ValueError(f"Expert ids must be from 0 to {geometry.num_experts - 1}, got {ids}.")
        et.require_blocks(prefix, geometry.hidden, geometry.intermediate)
        checkpoint = _Checkpoint(tensors, prefix, geometry, source)
        checkpoint.refuse_unknown()
        device = next((t.device for name, t in tensors.items() if name.startswith(prefix + ".")), torch.device("cpu"))
        weights = cls.empty(len(ids), geometry.hidden, geometry.intermediate, device)
        for projection in et.PROJECTIONS:
            for kind, destination in weights.projection(projection).items():
                for local, expert in enumerate(ids):
                    value = checkpoint.get(expert, projection, kind)
                    destination[local].copy_(value.reshape(destination.shape[1:]))
        for projection in et.PROJECTIONS:
            found = first_fault(*weights.projection(projection).values())
            if found:
                name = f"{prefix}.{ids[found.expert]}.{projection}.{found.kind}"
                raise et.fault(name, checkpoint.file(name), found.found, found.expected)
        return weights

    def projection(self, name: str) -> dict[str, torch.Tensor]:
        """Views of gate (``w1``), down (``w2``) or up (``w3``) by kind of tensor, each with E as first dimension."""
        if name == et.DOWN:
            parts = (self.w2, self.w2_scale, self.w2_global, self.w2_input_scale)
        else:
            half = 0 if name == et.GATE else 1
            rows = slice(half * self.intermediate, (half + 1) * self.intermediate)
            parts = (
                self.w13[:, rows],
                self.w13_scale[:, rows],
                self.w13_global[:, half],
                self.w13_input_scale[:, half],
            )
        return dict(zip(et.DTYPES, parts, strict=True))

    def validate(self, layer: str, expert_ids: Sequence[int] | None = None) -> None:
        """Check types, shapes and values of assembled weights; waits for the device three times.

        Args:
            layer: name of the layer, for messages.
            expert_ids: global ids of the local experts, for messages; local ids are named where it is None.

        Raises:
            CheckpointError: naming the layer, the expert and the projection.
        """
        self._validate_form(layer)
        for projection in et.PROJECTIONS:
            found = first_fault(*self.projection(projection).values())
            if found:
                which = f"local expert {found.expert}" if expert_ids is None else f"expert {expert_ids[found.expert]}"
                raise CheckpointError(
                    f"{layer}, {which}, {projection}.{found.kind}: {found.found}; expected {found.expected}. The "
                    f"checkpoint lacks this tensor or it is damaged. {et.REEXPORT}"
                )

    def _validate_form(self, layer: str) -> None:
        if self.w13.ndim != 3 or self.w2.ndim != 3:
            raise CheckpointError(
                f"{layer}: w13 and w2 have shapes {tuple(self.w13.shape)} and {tuple(self.w2.shape)}; expected "
                f"[experts, rows, packed columns] for both. {et.REEXPORT}"
            )
        et.require_blocks(layer, self.hidden, self.intermediate)
        for name, shape in _shapes(self.num_experts, self.hidden, self.intermediate).items():
            tensor = getattr(self, name)
            if tensor.dtype != _DTYPES[name] or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                layout = "" if tensor.is_contiguous() else ", not contiguous"
                raise CheckpointError(
                    f"{layer}, {_PROJECTIONS[name]} ({name}): {tensor.dtype} {tuple(tensor.shape)}{layout}; expected "
                    f"{_DTYPES[name]} {shape}, contiguous, from w13 {tuple(self.w13.shape)} and "
                    f"w2 {tuple(self.w2.shape)}. Serve a ModelOpt NVFP4 checkpoint of this geometry."
                )


_DTYPES = {
    f"{name}{suffix}": dtype
    for name in ("w13", "w2")
    for suffix, dtype in zip(("", "_scale", "_global", "_input_scale"), et.DTYPES.values(), strict=True)
}
_PROJECTIONS = {name: "w1 and w3" if name.startswith("w13") else "w2" for name in _DTYPES}


def _shapes(num_experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        "w13": (num_experts, 2 * intermediate, hidden // 2),
        "w13_scale": (num_experts, 2 * intermediate, hidden // et.BLOCK),
        "w13_global": (num_experts, 2),
        "w13_input_scale": (num_experts, 2),
        "w2": (num_experts, hidden, intermediate // 2),
        "w2_scale": (num_experts, hidden, intermediate // et.BLOCK),
        "w2_global": (num_experts,),
        "w2_input_scale": (num_experts,),
    }


@dataclass(frozen=True)
class _Checkpoint:
    """Access to one layer's expert tensors that explains what is wrong with them."""

    tensors: Mapping[str, torch.Tensor]
    prefix: str
    geometry: MoEGeometry
    source: str | Callable[[str], str]

    def file(self, name: str) -> str:
        if isinstance(self.source, str):
            return self.source
        try:
            return self.source(name)
        except KeyError:  # a file map has no entry for a missing tensor
            return "the checkpoint"

    def refuse_unknown(self) -> None:
        start = self.prefix + "."
        for name in self.tensors:
            if not name.startswith(start):
                continue
            parsed = et.parse(name[len(start) :])
            if parsed is None or parsed.expert >= self.geometry.num_experts:
                raise et.fault(
                    name,
                    self.file(name),
                    "unknown expert tensor",
                    f"only experts 0 to {self.geometry.num_experts - 1} with {', '.join(et.PROJECTIONS)}, each with "
                    f"{', '.join(et.DTYPES)}",
                    "Serve a checkpoint that ModelOpt exported to NVFP4, with its own config.json.",
                )

    def get(self, expert: int, projection: str, kind: str) -> torch.Tensor:
        name = f"{self.prefix}.{expert}.{projection}.{kind}"
        shape = et.shape_of(projection, kind, self.geometry.hidden, self.geometry.intermediate)
        expected = f"{et.MEANING[kind]}, {et.DTYPES[kind]} {list(shape)}"
        tensor = self.tensors.get(name)
        if tensor is None:
            raise et.fault(name, self.file(name), "the tensor is missing", expected)
        scalar = shape == () and tuple(tensor.shape) == (1,)
        if tensor.dtype != et.DTYPES[kind] or not (tuple(tensor.shape) == shape or scalar):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise et.fault(name, self.file(name), found, expected)
        return tensor
