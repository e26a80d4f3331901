"""The Backend for Blackwell (compute capability 10.0): checks, workspace and the sequence of launches."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch

from nvfp4_megamoe.backends.sm100 import driver, objects
from nvfp4_megamoe.backends.sm100.layout import CODE_BYTES, IMAGE_K, PART_SCALE_BYTES, SCALE_BYTES
from nvfp4_megamoe.backends.sm100.plan import MAX_EXPERTS, Plan, max_tiles, plan_launch, plan_shapes
from nvfp4_megamoe.backends.sm100.variants import first_variant, most_few_tokens, second_variant
from nvfp4_megamoe.backends.sm100.weights import Parameters, arrange
from nvfp4_megamoe.errors import UnsupportedError

if TYPE_CHECKING:
    from nvfp4_megamoe.moe.geometry import MoEGeometry
    from nvfp4_megamoe.moe.weights import ExpertWeights

ALIGN = 256
# Tokens of one launch sequence; more are computed in chunks, which bounds the workspace.
MAX_CHUNK = 8192
B200_MULTIPROCESSORS = 148
# How a token's slots are summed; the default first. Environment variable that chooses, where the caller does not.
SUMS, SUM_VARIABLE = ("ordered", "fused"), "NVFP4_SM100_SUM"
_NAMES = ("w13", "w13_scale", "w13_global", "w13_input_scale", "w2", "w2_scale", "w2_global", "w2_input_scale")


def shape_problem(num_experts: int, hidden: int, intermediate: int) -> str | None:
    """Why the kernels cannot compute this shape, or None."""
    if hidden % IMAGE_K or intermediate % IMAGE_K:
        return f"hidden {hidden} and intermediate {intermediate} must be multiples of {IMAGE_K}"
    if not 0 < num_experts <= MAX_EXPERTS:
        return f"{num_experts} local experts; the kernels take 1 to {MAX_EXPERTS}"
    return None


def choose_sum(sums: str | None) -> str:
    """``sums``, or what the environment says, or the default.

    Raises:
        UnsupportedError: there is no such mode.
    """
    sums = os.environ.get(SUM_VARIABLE, SUMS[0]) if sums is None else sums
    if sums not in SUMS:
        raise UnsupportedError(f"{SUM_VARIABLE} is {sums!r}; expected {' or '.join(SUMS)}")
    return sums


class Sm100Backend:
    """W4A4 with native NVFP4 tensor core instructions. One instance serves one layer."""

    name = "sm100"
    precisions = ("w4a4",)

    def __init__(
        self,
        geometry: MoEGeometry,
        precision: str | None = None,
        launcher: driver.Launcher | None = None,
        sums: str | None = None,
    ) -> None:
        """For one layer.

        Args:
            launcher: replaces the CUDA driver, for execution on a model of the device.
            sums: ``ordered``: GEMM 2 writes a row for each slot, and a second kernel sums a token's rows in float32 in
                the order of its choices, the same bits every time. ``fused``: GEMM 2 adds its rows to the token's
                in bfloat16, in no fixed order: fewer bytes and less workspace, but the last bits vary from run to
                run. None: ``$NVFP4_SM100_SUM``, or ``ordered``.
        """
        self.fused = choose_sum(sums) == "fused"
        self.geometry, self.precision, self.launcher = geometry, precision or self.precisions[0], launcher
        self.limit = math.inf if geometry.swiglu_limit is None else float(geometry.swiglu_limit)
        self.blocks = B200_MULTIPROCESSORS
        self.weights: ExpertWeights | None = None
        self.parameters: Parameters | None = None

    @classmethod
    def unsupported_reason(cls, geometry: MoEGeometry, device: torch.device) -> str | None:
        """See ``Backend.unsupported_reason``."""
        needed = "the sm100 backend needs a Blackwell GPU (compute capability 10.0)"
        if device.type != "cuda":
            return f"{needed}, not {device}"
        if (found := torch.cuda.get_device_capability(device)) != (10, 0):
            return f"{needed}; {device} has {found[0]}.{found[1]}"
        try:
            objects.read()
        except UnsupportedError as error:
            return str(error)
        return shape_problem(geometry.num_local_experts, geometry.hidden, geometry.intermediate)

    def prepare(self, weights: ExpertWeights) -> None:
        """Cut ``weights`` into images in place. Extra memory: twice one expert's larger projection."""
        problem = shape_problem(weights.num_experts, weights.hidden, weights.intermediate)
        if problem:
            raise UnsupportedError(problem)
        device = weights.w13.device
        for name in _NAMES:
            tensor = getattr(weights, name)
            if tensor.device != device or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise UnsupportedError(f"{name} must be contiguous, aligned to 16 bytes and on {device}")
        if self.launcher is None:
            self.launcher = driver.launcher(device)
            self.blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.parameters = arrange(weights)
        self.weights = weights

    def _parts(self, tokens: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every part of the workspace for ``tokens`` tokens."""
        hidden, inter = self.geometry.hidden, self.geometry.intermediate
        slots = tokens * self.geometry.top_k
        # Until the scales are known, the larger of one quantized row a token and one a slot.
        one_scale = self.parameters is not None and self.parameters.one_scale
        rows = tokens if one_scale else slots
        images, few_images = (
            max_tiles(count * self.geometry.top_k, self.geometry.num_local_experts) * (inter // IMAGE_K)
            for count in (tokens, min(tokens, most_few_tokens(self.geometry)))
        )
        plan = plan_shapes(tokens, self.geometry.top_k, self.geometry.num_local_experts, one_scale)
        parts = {name: (torch.int32, shape) for name, shape in plan.items()} | {
            "codes": (torch.uint8, (rows, hidden // 2)),
            "scales": (torch.uint8, (rows, hidden // 16)),
            "inter": (torch.uint8, (images, CODE_BYTES)),
            # Enough for whole images and for parts, so that fewer tokens never need more.
            "inter_scales": (torch.uint8, (max(images * SCALE_BYTES, few_images * PART_SCALE_BYTES),)),
        }
        return parts if self.fused else parts | {"slot_rows": (torch.bfloat16, (slots, hidden))}

    def workspace_bytes(self, max_tokens: int) -> int:
        """See ``Backend.workspace_bytes``."""
        parts = self._parts(min(max_tokens, MAX_CHUNK)).values()
        return ALIGN + sum(-(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN for dtype, shape in parts)

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
    ) -> None:
        """See ``Backend.forward``. Nothing waits for the device; launch sizes depend on shapes alone."""
        if self.weights is None:
            raise RuntimeError("forward before prepare: the weights are not arranged")
        self._check(x, topk_ids, topk_weights, expert_map, out, workspace)
        for begin in range(0, len(x), MAX_CHUNK):
            part = slice(begin, min(begin + MAX_CHUNK, len(x)))
            self._chunk(x[part], topk_ids[part], topk_weights[part], expert_map, out[part], workspace)

    def _chunk(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        w, p = self.weights, self.parameters
        tokens, top_k = topk_ids.shape
        hidden, inter = w.hidden, w.intermediate
        views, launch = self._carve(workspace, tokens), self.launcher.launch
        if self.fused:
            out.zero_()
        plan = Plan(**{name: views[name] for name in Plan._fields})
        launch(*plan_launch(plan, topk_ids, expert_map, w.num_experts, p.one_scale))
        quantized = [views["codes"], views["scales"]]
        launch("quantize_rows", len(plan.source), [x, plan.source, p.input_scales, *quantized, hidden])
        images, choices = [views["inter"], views["inter_scales"]], [plan.order, topk_weights, top_k]
        name = first_variant(tokens, self.geometry)
        blocks, tiles = self._tiles(name, plan)
        first = [*quantized, plan.a_row, w.w13, w.w13_scale, *tiles, p.first, *images, *choices]
        launch(name, blocks, [*first, 2 * inter, hidden, self.limit])
        name = second_variant(tokens, self.geometry, self.fused)
        blocks, tiles = self._tiles(name, plan)
        rows = out if self.fused else views["slot_rows"]
        second = [*images, plan.a_row, w.w2, w.w2_scale, *tiles, p.second, rows, views["scales"], *choices]
        launch(name, blocks, [*second, hidden, inter, self.limit])
        if not self.fused:
            launch("sum_slots", tokens, [rows, plan.here, out, top_k, hidden])

    def _tiles(self, name: str, plan: Plan) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
        """Blocks of a GEMM's launch, and its table with the number of rows."""
        if "pair" in name:
            return self.blocks // 2 * 2, (plan.pairs, plan.num_pairs)
        return self.blocks, (plan.tiles, plan.num_tiles)

    def _carve(self, workspace: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
        """Parts of the workspace."""
        at, views = -workspace.data_ptr() % ALIGN, {}
        for name, (dtype, shape) in self._parts(tokens).items():
            size = math.prod(shape) * dtype.itemsize
            views[name] = workspace[at : at + size].view(dtype).view(shape)
            at += -(-size // ALIGN) * ALIGN
        return views

    def _check(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        tokens, device = len(x), self.weights.w13.device
        choices, ids = (tokens, self.geometry.top_k), (torch.int32, torch.int64)
        for name, tensor, shape, dtypes in (
            ("x", x, (tokens, self.weights.hidden), (torch.bfloat16,)),
            ("out", out, (tokens, self.weights.hidden), (torch.bfloat16,)),
            ("topk_ids", topk_ids, choices, ids),
            ("topk_weights", topk_weights, choices, (torch.float32,)),
            ("expert_map", expert_map, None, (torch.int32,)),
            ("workspace", workspace, None, (torch.uint8,)),
        ):
            if tensor is None:
                continue
            if tensor.dtype not in dtypes or (shape is not None and tuple(tensor.shape) != shape):
                raise UnsupportedError(f"{name}: expected {dtypes} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.device != device:
                raise UnsupportedError(f"{name} is on {tensor.device}, the weights are on {device}")
            if not tensor.is_contiguous() or (name in ("x", "out") and tensor.data_ptr() % 16):
                raise UnsupportedError(f"{name} must be contiguous and aligned to 16 bytes")
        needed = self.workspace_bytes(tokens)
        if tokens and (workspace is None or workspace.numel() < needed):
            given = 0 if workspace is None else workspace.numel()
            raise UnsupportedError(f"the workspace has {given} bytes, {needed} are needed for {tokens} tokens")
