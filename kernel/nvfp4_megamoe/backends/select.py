"""Which backend computes a layer: the first of the table that supports it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from nvfp4_megamoe.errors import UnsupportedError

if TYPE_CHECKING:
    from nvfp4_megamoe.backends.protocol import Backend
    from nvfp4_megamoe.moe.geometry import MoEGeometry

# Name to class, in order of preference; a module is imported when its turn comes.
BACKENDS = {
    "cpu": "nvfp4_megamoe.backends.cpu.backend:CpuBackend",
    "sm90": "nvfp4_megamoe.backends.sm90.backend:Sm90Backend",
}
# Taken only by name: no layer test has passed on hardware yet.
ONLY_BY_NAME = {"sm100": "nvfp4_megamoe.backends.sm100.backend:Sm100Backend"}


def select(
    geometry: MoEGeometry, device: torch.device, precision: str | None = None, name: str | None = None
) -> Backend:
    """A new backend for one layer, not yet given its weights.

    Args:
        geometry: of the layer on this rank.
        device: of its weights.
        precision: of the activations, such as ``w4a16``; the backend's default where it is None.
        name: of the only backend to consider, which may be one of ``ONLY_BY_NAME``; every one of ``BACKENDS``, in
            order, where it is None.

    Raises:
        UnsupportedError: naming every backend considered and why it cannot compute the layer.
    """
    reasons = {}
    for candidate in _considered(name):
        backend = _load(candidate)
        reason = _reason(backend, geometry, device, precision)
        if reason is None:
            return backend(geometry, precision)
        reasons[candidate] = reason
    raise UnsupportedError(_message(reasons))


def unsupported_reason(
    geometry: MoEGeometry, device: torch.device, precision: str | None = None, name: str | None = None
) -> str | None:
    """Why ``select`` would raise for the same arguments, or None; builds nothing."""
    reasons = {candidate: _reason(_load(candidate), geometry, device, precision) for candidate in _considered(name)}
    return None if None in reasons.values() else _message(reasons)


def _considered(name: str | None) -> tuple[str, ...]:
    if name is None:
        return tuple(BACKENDS)
    known = BACKENDS | ONLY_BY_NAME
    if name not in known:
        raise UnsupportedError(f"There is no backend {name!r}; expected one of: {', '.join(known)}.")
    return (name,)


def _load(name: str) -> type[Backend]:
    module, _, attribute = (BACKENDS | ONLY_BY_NAME)[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _reason(backend: type[Backend], geometry: MoEGeometry, device: torch.device, precision: str | None) -> str | None:
    if precision is not None and precision not in backend.precisions:
        return f"precision {precision!r} is not one of {', '.join(backend.precisions)}"
    return backend.unsupported_reason(geometry, torch.device(device))


def _message(reasons: dict[str, str | None]) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    unasked = ", ".join(ONLY_BY_NAME.keys() - reasons.keys())
    return f"No NVFP4 MoE backend computes this layer. {listed}." + (
        f" Taken by name alone: {unasked}." if unasked else ""
    )
