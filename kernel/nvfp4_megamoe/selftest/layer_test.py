"""The layer test: a layer on the backend that will serve it, against the oracle on the checkpoint's own tensors.

``LayerTest(...)`` before ``Backend.prepare``, which may rewrite the weights in place; then ``run(layer)``.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvfp4_megamoe.backends.protocol import Backend, precision_at
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.moe import oracle
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.numerics import nvfp4
from nvfp4_megamoe.numerics.metrics import norms
from nvfp4_megamoe.selftest import inputs
from nvfp4_megamoe.selftest.batches import Batches, make_batches
from nvfp4_megamoe.selftest.judge import judge_probes, judge_rows
from nvfp4_megamoe.selftest.limits import limits_for
from nvfp4_megamoe.selftest.probes import Probes, make_probes
from nvfp4_megamoe.selftest.report import ROUTING, LayerReport, Measurement
from nvfp4_megamoe.selftest.tipping import Reference, tipping

_SIZES_OF_PRECISIONS = (1, 64, 256, 1024, 4096, 8192)

# A MoELayer, or another function of (x, topk_ids, topk_weights, expert_map, out) that returns out.
Layer = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Options:
    """How much is tested.

    experts: local experts compared in full, the last one always among them; None for all. seed: of tokens and of the
    choice of experts, together with the layer's name. all_sizes: run batches of 1, 8 and 2048 tokens as well, so that
    a backend's choice of kernel by the number of tokens is covered; the precisions that it chooses between always are.
    """

    experts: int | None = 2
    seed: int = 0
    all_sizes: bool = False


class LayerTest:
    """One layer's tokens and what the oracle makes of them."""

    def __init__(
        self,
        name: str,
        geometry: MoEGeometry,
        weights: ExpertWeights,
        backend: Backend,
        expert_map: torch.Tensor | None = None,
        options: Options | None = None,
    ) -> None:
        """Compute the references; ``weights`` must still be in the checkpoint's layout.

        Scratch memory: one expert in float64 three times over, for V4-Pro 0.5 GiB. Nothing is copied to the host.

        Args:
            name: of the layer, for messages.
            geometry: of the layer on this rank.
            weights: checked ones, on the device that will serve.
            backend: that will serve, not yet prepared.
            expert_map: as for ``MoELayer``; the layer is run with it.
            options: defaults where None.
        """
        started = time.perf_counter()
        self.options = options or Options()
        self.name, self.geometry, self.backend, self.expert_map = name, geometry, backend, expert_map
        self._device = weights.w13.device
        rng = torch.Generator().manual_seed(zlib.crc32(f"{name} {self.options.seed}".encode()))
        self.expert_ids = _global_ids(weights.num_experts, expert_map)
        with torch.device("cpu"):  # a loader may have set another default, which the generator would not fit
            self._compared = self._choose(weights.num_experts, rng)
            if self.expert_ids:
                self._reference(weights, rng)
        self._seconds = time.perf_counter() - started

    def run(self, layer: Layer) -> LayerReport:
        """Run the batches on ``layer``, whose backend is prepared now, and compare; waits for the device."""
        started = time.perf_counter()
        measurements = []
        if self.expert_ids:
            for index in self._batches.indices:
                measurements += self._judge(index, self._forward(layer, index))
        seconds = self._seconds + time.perf_counter() - started
        kernels = f"{self.backend.name} ({self.backend.precision})"
        return LayerReport(self.name, kernels, tuple(measurements), seconds)

    def _choose(self, experts: int, rng: torch.Generator) -> list[int]:
        """Local experts to compare in full. The last one's tensors have the largest offsets, which may overflow."""
        count = experts if self.options.experts is None else min(self.options.experts, experts)
        others = torch.randperm(max(experts - 1, 0), generator=rng)[: max(count - 1, 0)].tolist()
        return sorted(others) + ([experts - 1] if count else [])

    def _reference(self, weights: ExpertWeights, rng: torch.Generator) -> None:
        g, compared = self.geometry, self._compared
        tokens, mixed = [], None
        gate, up = torch.empty((2, g.intermediate, g.hidden), dtype=torch.float32, device=self._device)
        for expert in compared:
            _dequantize(weights, expert, et.GATE, gate)
            _dequantize(weights, expert, et.UP, up)
            tokens.append(inputs.expert_tokens(gate, up, g.swiglu_limit, rng))
            if mixed is None:
                mixed = inputs.plain_tokens(inputs.row_norm(gate, up), inputs.MIXED_TOKENS + 1, g.hidden, rng)
        del gate, up
        self._batches: Batches = make_batches(
            g, compared, self.expert_ids, [len(part) for part in tokens], self.expert_map, self._sizes(), rng
        )
        precisions = self._cover_precisions()
        self._probes: Probes = make_probes(weights, g.swiglu_limit, precisions, rng)
        self._tokens = torch.cat([*tokens, *([] if mixed is None else [mixed]), self._probes.tokens])
        self._expected = {precision: [] for precision in precisions}
        for precision in precisions:
            routed = torch.zeros((inputs.MIXED_TOKENS + 1, g.hidden), dtype=torch.float64, device=self._device)
            moved = torch.zeros(len(routed), dtype=torch.float64, device=self._device)
            for column, (expert, own) in enumerate(zip(compared, tokens, strict=True)):
                found = self._expert(weights, expert, torch.cat([own, mixed]), precision)
                self._expected[precision].append(found[: len(own)])
                slots = found.rows[len(own) :] * self._batches.mixed_weights[:, column, None].to(self._device)
                routed += slots
                moved += (slots.norm(dim=1) * found.moved[len(own) :]).square()
            self._expected[precision].append(Reference(routed, moved.sqrt() / norms(routed)))

    def _expert(
        self, weights: ExpertWeights, expert: int, x: torch.Tensor, precision: oracle.LayerPrecision
    ) -> Reference:
        """The oracle's output of one expert for the tokens ``x``."""
        limit, scale = self.geometry.swiglu_limit, weights.w2_input_scale[expert]
        _, gate_up, _, intermediate, out = oracle.expert_stages(weights, expert, x, limit, precision)
        return Reference(out, tipping(gate_up, intermediate, limit, scale, oracle.of_projections(precision)[1]))

    def _sizes(self) -> tuple[int, ...]:
        return (1, 8, 2048) if self.options.all_sizes else ()

    def _cover_precisions(self) -> tuple[oracle.LayerPrecision, ...]:
        """Add a batch for each precision that the backend has at other sizes alone; return all precisions."""
        covered = dict.fromkeys(self._precision(len(index)) for index in self._batches.indices)
        for size in _SIZES_OF_PRECISIONS:
            if self._precision(size) not in covered:
                covered[self._precision(size)] = None
                self._batches.indices.append(torch.arange(size) % len(self._batches.ids))
        return tuple(covered)

    def _precision(self, tokens: int) -> oracle.LayerPrecision:
        experts = self.geometry.num_local_experts if self.expert_map is None else self.expert_map.numel()
        return precision_at(self.backend, tokens, experts)

    def _forward(self, layer: Layer, index: torch.Tensor) -> torch.Tensor:
        rows = index.to(self._device)
        ids, weights = (part.to(self._device)[rows] for part in (self._batches.ids, self._batches.weights))
        x = self._tokens[rows]
        # NaN, so that a row that is not written shows.
        return layer(x, ids, weights, self.expert_map, out=torch.full_like(x, float("nan")))

    def _judge(self, index: torch.Tensor, out: torch.Tensor) -> list[Measurement]:
        precision = self._precision(len(index))
        label = "+".join(dict.fromkeys(oracle.of_projections(precision)))
        found, begin = [], 0
        names = [f"expert {self.expert_ids[expert]}" for expert in self._compared] + [ROUTING]
        for name, expected in zip(names, self._expected[precision], strict=True):
            here = ((index >= begin) & (index < begin + len(expected))).nonzero().flatten()
            if len(here):
                rows = index[here] - begin
                different = min(len(rows.unique()), len(expected) - (name == ROUTING))  # the last mixed token is zero
                limits = limits_for(precision, self.geometry.intermediate, different)
                columns = name != ROUTING and len(here) >= len(expected)
                got, wanted = out[here.to(self._device)], expected[rows.to(self._device)]
                found += judge_rows(name, got, wanted, limits, label, len(index), columns=columns)
            begin += len(expected)
        here = (index >= begin).nonzero().flatten()
        if len(here):
            experts = index[here] - begin
            rows, on_device = here.to(self._device), experts.to(self._device)
            channels, expected = self._probes.channels[on_device], self._probes.expected[precision][on_device]
            names = [f"expert {self.expert_ids[expert]}" for expert in experts.tolist()]
            limits = limits_for(precision, self.geometry.intermediate, len(here))
            found.append(judge_probes(names, out[rows].gather(1, channels), expected, limits, label, len(index)))
        return found


def _dequantize(weights: ExpertWeights, expert: int, projection: str, out: torch.Tensor) -> None:
    """Write a projection's weights to ``out``, float32 [rows, columns]."""
    packed, scale, global_scale, _ = (part[expert] for part in weights.projection(projection).values())
    parts = (tensor.split(oracle.rows_at_once(packed)) for tensor in (out, packed, scale))
    for rows, codes, scales in zip(*parts, strict=True):
        rows.copy_(nvfp4.dequantize(codes, scales, global_scale))


def _global_ids(experts: int, expert_map: torch.Tensor | None) -> list[int]:
    """Global id of each local expert."""
    if expert_map is None:
        return list(range(experts))
    local = expert_map.tolist()
    ids = {here: expert for expert, here in enumerate(local) if here >= 0}
    missing = [expert for expert in range(experts) if expert not in ids]
    if missing:
        raise ValueError(f"expert_map has no global expert for local expert(s) {missing}; it maps to {sorted(ids)}.")
    return [ids[expert] for expert in range(experts)]
