"""What a layer test found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ROUTING = "routing"


class Measurement(NamedTuple):
    """One number of one batch.

    subject: ``expert 17`` (global id), or ``ROUTING`` for tokens of several experts. metric: as in ``judge.py``.
    tokens: of the batch. It passes where ``value <= limit``.
    """

    subject: str
    metric: str
    value: float
    limit: float
    precision: str
    tokens: int
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return (
            f"{self.subject}: {self.metric} {self.value:.3g}{detail}, limit {self.limit:.3g}, "
            f"in {self.precision} with {self.tokens} tokens"
        )


@dataclass(frozen=True)
class LayerReport:
    """All measurements of one layer. backend: name of the kernels. seconds: of the host, oracle included."""

    layer: str
    backend: str
    measurements: tuple[Measurement, ...]
    seconds: float

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """Those above their limits: experts' before those of tokens of several experts, the furthest first."""
        failed = (m for m in self.measurements if not m.passed)
        return tuple(sorted(failed, key=lambda m: (m.subject == ROUTING, -m.value / m.limit)))

    @property
    def passed(self) -> bool:
        return not self.failures

    def worst(self) -> dict[str, Measurement]:
        """The measurement nearest to its limit, by metric."""
        worst: dict[str, Measurement] = {}
        for m in self.measurements:
            if m.metric not in worst or m.value / m.limit > worst[m.metric].value / worst[m.metric].limit:
                worst[m.metric] = m
        return worst

    def message(self) -> str:
        """One line that names the layer, the backend and the worst failure; the outcome where all passed."""
        if self.passed:
            return f"layer test of {self.layer} on {self.backend} passed"
        others = len(self.failures) - 1
        more = f"; {others} more measurement(s) failed" if others else ""
        return f"layer test of {self.layer} on {self.backend} failed: {self.failures[0]}{more}"


class LayerTestError(RuntimeError):
    """A layer whose backend computes something else than the oracle; ``report`` has all measurements."""

    def __init__(self, message: str, report: LayerReport) -> None:
        super().__init__(message)
        self.report = report
