"""The Backend for Hopper: checks, workspace and the launch sequence; the arithmetic is in ``csrc``."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

import torch

from nvfp4_megamoe.backends.sm90 import library
from nvfp4_megamoe.errors import UnsupportedError

if TYPE_CHECKING:
    from nvfp4_megamoe.moe.geometry import MoEGeometry
    from nvfp4_megamoe.moe.oracle import LayerPrecision
    from nvfp4_megamoe.moe.weights import ExpertWeights

ALIGN = 256
BLOCK_K = 128
MAX_EXPERTS = 512
MAX_CHUNK = 8192  # tokens a launch sequence; more are computed in chunks, which bounds the workspace
MAX_WARPGROUPS = 4
# Slots a tile, as compiled in csrc/api.cu
VARIANTS = (8, 16, 24, 32, 48, 80, 96, 128)
E4M3_VARIANTS = (48, 80, 96, 144, 256)
# E4M3 variant and the most slots of a busy expert that it is best for; two tiles of 144 beat a full 256 and a rest.
E4M3_CHOICE = ((48, 48), (80, 80), (96, 96), (144, 160), (256, 256), (144, 288))

# Slots that an expert has on average from which each projection is computed in e4m3: docs/sm90-kernel.md.
NEVER = math.inf
POLICIES = {
    "auto": (NEVER, 48.0),
    "exact": (NEVER, NEVER),
    "fast": (24.0, 24.0),
    "w4a16": (NEVER, NEVER),
    "w4a8": (0.0, 0.0),
}


def shape_problem(num_experts: int, hidden: int, intermediate: int) -> str | None:
    """Why the kernels cannot compute this shape, or None."""
    if hidden % BLOCK_K or intermediate % BLOCK_K:
        return f"hidden {hidden} and intermediate {intermediate} must be multiples of {BLOCK_K}"
    if not 0 < num_experts <= MAX_EXPERTS:
        return f"{num_experts} local experts, at most {MAX_EXPERTS} are supported"
    return None


def busy_slots(tokens: int, top_k: int, num_experts: int) -> float:
    """Slots of a busy expert, from shapes alone, so that a CUDA graph is valid for any routing."""
    mean = tokens * top_k / num_experts
    return min(tokens, mean + 2 * math.sqrt(mean))


def choose_variant(tokens: int, top_k: int, num_experts: int, e4m3: bool = False) -> int:
    """Slots a tile: a busy expert's, where it can be."""
    busy = busy_slots(tokens, top_k, num_experts)
    if e4m3:
        return next((v for v, most in E4M3_CHOICE if busy <= most), E4M3_VARIANTS[-1])
    return next((v for v in VARIANTS if v >= busy), VARIANTS[-1])


class Sm90Backend:
    """NVFP4 weights times bfloat16 or e4m3 activations on SM90; ``prepare`` repacks one layer's weights in place.

    The precision is a policy: ``exact`` (``w4a16``) always multiplies in bfloat16, ``w4a8`` always in e4m3, ``fast`` in
    e4m3 wherever that is faster, and ``auto`` where arithmetic bounds the time and the result stays within the error
    budget of W4A8, which is the second projection of large batches.
    """

    name = "sm90"
    precisions = tuple(POLICIES)

    def __init__(self, geometry: MoEGeometry, precision: str | None = None, kernels: ctypes.CDLL | None = None) -> None:
        """``kernels``: a library of ``library.open_library`` to measure; serving has ``library.load``'s."""
        self.geometry = geometry
        self._kernels = kernels
        self.precision = precision or "auto"
        self.thresholds = POLICIES[self.precision]
        self.limit = math.inf if geometry.swiglu_limit is None else float(geometry.swiglu_limit)
        self.weights: ExpertWeights | None = None

    @classmethod
    def unsupported_reason(cls, geometry: MoEGeometry, device: torch.device) -> str | None:
        """See ``Backend.unsupported_reason``."""
        hopper = (
            device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)
        )
        if not hopper:
            return f"the sm90 backend needs a Hopper GPU (compute capability 9.0), not {device}"
        if not library.library_path().exists():
            return f"{library.library_path()} does not exist: run python -m nvfp4_megamoe.backends.sm90.build"
        return shape_problem(geometry.num_local_experts, geometry.hidden, geometry.intermediate)

    def prepare(self, weights: ExpertWeights) -> None:
        """Repack ``weights`` in place (csrc/layout.cuh). Extra memory: one expert's larger projection."""
        experts, rows, _ = weights.w13.shape
        hidden, intermediate = weights.w2.shape[1], rows // 2
        if problem := shape_problem(experts, hidden, intermediate):
            raise UnsupportedError(problem)
        for name in ("w13", "w13_scale", "w13_global", "w2", "w2_scale", "w2_global"):
            tensor = getattr(weights, name)
            if not tensor.is_cuda or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise UnsupportedError(f"{name} must be a contiguous CUDA tensor aligned to 16 bytes")
        lib = self._kernels or library.load()
        with torch.cuda.device(weights.w13.device):
            stream = torch.cuda.current_stream().cuda_stream
            largest = max(rows * hidden, hidden * intermediate)
            scratch = torch.empty(largest // 2 + largest // 16, dtype=torch.uint8, device=weights.w13.device)
            for values, scales, n, k, gate_up in (
                (weights.w13, weights.w13_scale, rows, hidden, 1),
                (weights.w2, weights.w2_scale, hidden, intermediate, 0),
            ):
                code = lib.nvfp4_sm90_repack(
                    values.data_ptr(), scales.data_ptr(), experts, n, k, gate_up, scratch.data_ptr(), stream
                )
                library.check(lib, code, "repacking weights")
            torch.cuda.current_stream().synchronize()
            self.grid = torch.cuda.get_device_properties(weights.w13.device).multi_processor_count
        self.weights = weights
        self.num_experts, self.hidden, self.intermediate = experts, hidden, intermediate
        self.partial_bytes = lib.nvfp4_sm90_partial_bytes(self.grid)

    def in_e4m3(self, tokens: int, num_experts: int) -> tuple[bool, bool]:
        """Whether each projection of ``tokens`` tokens over ``num_experts`` global experts is computed in e4m3."""
        mean = min(tokens, MAX_CHUNK) * self.geometry.top_k / num_experts
        first, second = self.thresholds
        return mean >= first, mean >= second

    def precision_at(self, tokens: int, num_experts: int) -> LayerPrecision:
        """See ``protocol.precision_at``."""
        first, second = ("w8a8" if e4m3 else "w4a16" for e4m3 in self.in_e4m3(tokens, num_experts))
        return first if first == second else (first, second)

    def _capacity(self, slots: int) -> int:
        """Rows of the arrays by slot: every expert's first slot is a multiple of 8."""
        return -(-(slots + 7 * min(self.num_experts, slots)) // 8) * 8

    def _regions(self, slots: int) -> tuple[dict[str, int], int]:
        """Byte offsets of the workspace's parts for ``slots`` (token, k) pairs, and its size."""
        capacity = self._capacity(slots)
        sizes = {
            "order": 4 * capacity,
            "inverse": 4 * slots,
            "offsets": 4 * self.num_experts,
            "counts": 4 * self.num_experts,
            "flags": 4 * 2 * MAX_WARPGROUPS * self.grid,
            "partial": self.partial_bytes,
            "act_scale": 4 * capacity,
            "intermediate": 2 * capacity * self.intermediate,
            "slot_out": 2 * capacity * self.hidden,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // ALIGN) * ALIGN
        return offsets, at

    def workspace_bytes(self, max_tokens: int) -> int:
        """See ``Backend.workspace_bytes``."""
        return self._regions(min(max_tokens, MAX_CHUNK) * self.geometry.top_k)[1] + ALIGN

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor,
        workspace: torch.Tensor | None,
        variant: int | None = None,
        variant2: int | None = None,
    ) -> None:
        """See ``Backend.forward``. The variants override each projection's slots a tile, for tests and tuning."""
        w = self.weights
        if w is None:
            raise RuntimeError("forward before prepare: the weights are not packed")
        tokens, top_k = topk_ids.shape
        self._check(x, topk_ids, topk_weights, expert_map, out, workspace)
        if tokens == 0:
            return
        base = -(-workspace.data_ptr() // ALIGN) * ALIGN
        experts = self.num_experts if expert_map is None else expert_map.numel()
        lib, stream = self._kernels or library.load(), torch.cuda.current_stream(x.device).cuda_stream
        for begin in range(0, tokens, MAX_CHUNK):
            count = min(MAX_CHUNK, tokens - begin)
            offsets, size = self._regions(count * top_k)
            first, second = self.in_e4m3(count, experts)
            if base + size > workspace.data_ptr() + workspace.numel():
                raise UnsupportedError(
                    f"the workspace has {workspace.numel()} bytes, {size + ALIGN} are needed for {count} tokens"
                )
            args = library.ForwardArgs(
                x=x[begin:].data_ptr(),
                ids=topk_ids[begin:].data_ptr(),
                topk_weights=topk_weights[begin:].data_ptr(),
                expert_map=None if expert_map is None else expert_map.data_ptr(),
                out=out[begin:].data_ptr(),
                w13=w.w13.data_ptr(),
                w13_scale=w.w13_scale.data_ptr(),
                w2=w.w2.data_ptr(),
                w2_scale=w.w2_scale.data_ptr(),
                w13_global=w.w13_global.data_ptr(),
                w2_global=w.w2_global.data_ptr(),
                **{name: base + offset for name, offset in offsets.items()},
                tokens=count,
                topk=top_k,
                ids_64=int(topk_ids.dtype == torch.int64),
                map_size=0 if expert_map is None else expert_map.numel(),
                num_experts=self.num_experts,
                hidden=self.hidden,
                intermediate_size=self.intermediate,
                variant=variant or choose_variant(count, top_k, experts, first),
                variant2=variant2 or choose_variant(count, top_k, experts, second),
                e4m3_first=int(first),
                e4m3_second=int(second),
                grid=self.grid,
                capacity=self._capacity(count * top_k),
                num_flags=2 * MAX_WARPGROUPS * self.grid,
                limit=self.limit,
            )
            library.check(lib, lib.nvfp4_sm90_forward(ctypes.byref(args), stream), "the MoE layer's launch")

    def _check(self, x, topk_ids, topk_weights, expert_map, out, workspace) -> None:
        tokens = topk_ids.shape[0]
        for name, tensor, shape, dtypes in (
            ("x", x, (tokens, self.hidden), (torch.bfloat16,)),
            ("out", out, (tokens, self.hidden), (torch.bfloat16,)),
            ("topk_ids", topk_ids, tuple(topk_ids.shape), (torch.int32, torch.int64)),
            ("topk_weights", topk_weights, tuple(topk_ids.shape), (torch.float32,)),
            ("expert_map", expert_map, None, (torch.int32,)),
            ("workspace", workspace, None, (torch.uint8,)),
        ):
            if tensor is None:
                if name == "workspace" and tokens:
                    raise UnsupportedError("a workspace of workspace_bytes(tokens) bytes is needed")
                continue
            if tensor.dtype not in dtypes or (shape is not None and tuple(tensor.shape) != shape):
                raise UnsupportedError(f"{name}: expected {dtypes} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            if not tensor.is_contiguous() or (name in ("x", "out") and tensor.data_ptr() % 16):
                raise UnsupportedError(f"{name} must be contiguous and aligned to 16 bytes")
            if tensor.device != self.weights.w13.device:
                raise UnsupportedError(f"{name} is on {tensor.device}, the weights are on {self.weights.w13.device}")
