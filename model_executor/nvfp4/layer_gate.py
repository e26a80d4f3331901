"""The layer test between weight preparation and serving: each rank tests each of its layers on what will serve it.

``MEGA_MOE_LAYER_TEST``
    ``strict`` (default)  a layer that fails stops the server
    ``fallback:BACKEND`` or ``fallback:BACKEND:PRECISION``  a layer that fails is served by another backend
    ``report``            failures are logged and served
    ``off``               nothing is tested

docs/startup.md says what is compared, with which limits, and what is not covered.
"""

from __future__ import annotations

import torch
from nvfp4_megamoe.backends import select
from nvfp4_megamoe.backends.protocol import Backend
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.layer import MoELayer
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.selftest import LayerReport, LayerTest, LayerTestError, Options
from vllm.logger import init_logger

from . import fallback, progress
from .gate_setting import FALLBACK, OFF, REPORT, Fallback, read_setting

logger = init_logger(__name__)

_tested_sizes: set[tuple[MoEGeometry, str, str]] = set()


def prepare(layer: torch.nn.Module, geometry: MoEGeometry, weights: ExpertWeights, backend: Backend) -> MoELayer | None:
    """Prepare and test one layer.

    Args:
        layer: vLLM's routed experts, which own ``weights``; names the layer and has its expert map.
        geometry, weights: of the layer on this rank; the weights in the checkpoint's layout, their values checked.
        backend: the one chosen to serve.

    Returns:
        The layer that serves, or None where a backend of vLLM's own serves it: ``layer`` is then complete.

    Raises:
        LayerTestError: the layer failed and there is no fallback, or the fallback failed too.
    """
    setting = read_setting()
    if setting.mode == OFF:
        logger.warning_once("MEGA_MOE_LAYER_TEST=off: no layer is compared with the oracle before it serves")
        return MoELayer(geometry, weights, backend)
    # Kernels may rewrite the weights in place; the copy lives until this layer has passed.
    originals = _copied(weights) if setting.mode == FALLBACK else None
    served, report = _tested(layer, geometry, weights, backend)
    if report.passed:
        return served
    if originals is None:
        if setting.mode != REPORT:
            raise LayerTestError(f"{report.message()}. MEGA_MOE_LAYER_TEST=strict does not serve it.", report)
        logger.error("%s. MEGA_MOE_LAYER_TEST=report: it is SERVED ALL THE SAME, its output is wrong", report.message())
        return served
    del served
    for name, tensor in vars(weights).items():
        tensor.copy_(getattr(originals, name))
    del originals
    assert setting.fallback is not None
    return _fall_back(layer, geometry, weights, setting.fallback, report)


def _fall_back(
    layer: torch.nn.Module, geometry: MoEGeometry, weights: ExpertWeights, other: Fallback, failed: LayerReport
) -> MoELayer | None:
    if not other.is_ours:
        try:
            fallback.hand_over(layer, weights, other.backend)
        except ValueError as error:
            raise LayerTestError(f"{failed.message()}. The fallback cannot serve it: {error}", failed) from error
        logger.warning("%s. This layer is served by vLLM's %s, which is not tested", failed.message(), other.backend)
        return None
    second = select.select(geometry, weights.w13.device, other.precision, other.backend)
    served, report = _tested(layer, geometry, weights, second)
    if not report.passed:
        raise LayerTestError(f"{failed.message()}. The fallback failed too: {report.message()}", report)
    logger.warning("%s. This layer is served by %s, which passed", failed.message(), report.backend)
    return served


def _tested(
    layer: torch.nn.Module, geometry: MoEGeometry, weights: ExpertWeights, backend: Backend
) -> tuple[MoELayer, LayerReport]:
    """The prepared layer, and what the test says about it."""
    # Which kernel runs depends on shapes alone: batches of every size are run once for a geometry, not in every layer.
    kind = (geometry, backend.name, backend.precision)
    options = Options(all_sizes=kind not in _tested_sizes)
    _tested_sizes.add(kind)
    with progress.phase(progress.LAYER_TEST, layers=1) as record:
        test = LayerTest(layer.layer_name, geometry, weights, backend, layer.expert_map, options)
    served = MoELayer(geometry, weights, backend)
    with progress.phase(progress.LAYER_TEST):
        report = test.run(served)
    record.add(layers=1)
    logger.debug("%s in %.3f s", report.message(), report.seconds)
    return served, report


def _copied(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(**{name: tensor.clone() for name, tensor in vars(weights).items()})
