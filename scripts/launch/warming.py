"""Whether and for how long the entrypoint sends warm-up requests before /health may answer 200."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from .flags import Api, FlagError

MODES = ("auto", "strict", "report", "off")
LIMIT_S = 1800.0


class Setting(NamedTuple):
    """``send``: whether to; ``strict``: a request that fails ends the server; ``why_not``: why nothing is sent."""

    send: bool
    strict: bool
    limit_s: float
    why_not: str | None = None


def read(environment: Mapping[str, str], api: Api, cpu_build: bool) -> Setting:
    """Read MEGA_MOE_WARM_UP and MEGA_MOE_WARM_UP_SECONDS.

    ``auto`` is strict on a GPU, and off where there is nothing to warm or no way to: on vLLM's CPU build, whose kernels
    do not depend on shapes, and where no request can be sent.

    Raises:
        FlagError: an unknown mode, a limit that is no positive number, or a mode that the server's flags do not allow.
    """
    mode = environment.get("MEGA_MOE_WARM_UP") or "auto"
    if mode not in MODES:
        raise FlagError(f"MEGA_MOE_WARM_UP is {mode!r}: expected {', '.join(MODES)}")
    text = environment.get("MEGA_MOE_WARM_UP_SECONDS") or str(LIMIT_S)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise FlagError(f"MEGA_MOE_WARM_UP_SECONDS is {text!r}: expected a number of seconds above 0, such as 1800")
    if mode == "off":
        return Setting(False, False, limit, "MEGA_MOE_WARM_UP=off")
    if mode == "auto" and (cpu_build or api.unreachable):
        return Setting(False, False, limit, api.unreachable or "vLLM's CPU build compiles nothing by shape")
    if api.unreachable:
        raise FlagError(f"MEGA_MOE_WARM_UP={mode}: no request can be sent: {api.unreachable}; set it to auto or off")
    return Setting(True, mode != "report", limit)


def hold_variable(path: os.PathLike[str]) -> dict[str, str]:
    """The variable by which the server's /health knows of the file that holds it back."""
    return {"MEGA_MOE_HEALTH_HOLD": os.fspath(path)}
