"""Which modules were prepared while others were still being loaded, so that none is prepared twice."""

from __future__ import annotations

import torch

_MARK = "_nvfp4_prepared_while_loading"


def mark(module: torch.nn.Module) -> None:
    """Say that the weights of ``module`` have been prepared."""
    setattr(module, _MARK, True)


def take(module: torch.nn.Module) -> bool:
    """Whether ``module`` was marked since the last question; a later load of the same module is prepared again."""
    return module.__dict__.pop(_MARK, False)
