"""Checkpoints, their float32 references and the running demo server, each made once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import checkpoints, reference
from .support import Server, prompt_tokens, running_server


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run keeps checkpoints and logs."""
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def checkpoint(directory: Path) -> Path:
    """The demo's NVFP4 checkpoint."""
    return checkpoints.make(directory / "nvfp4")


@pytest.fixture(scope="session")
def unequal_checkpoint(directory: Path) -> Path:
    """As the demo's, but with an up projection whose weight_scale_2 is 1.25 times the gate's."""
    return checkpoints.make(directory / "unequal", "--gate-up-ratio", "1.25")


@pytest.fixture(scope="session")
def expected(directory: Path) -> dict[int, list[float]]:
    """Log-probabilities of 300 and of 3000 tokens from the demo's weights in float32."""
    model = reference.load(checkpoints.make(directory / "nvfp4-plain", "--dequantize"))
    return {count: reference.logprobs(model, prompt_tokens(count)) for count in (300, 3000)}


@pytest.fixture(scope="session")
def expected_unequal(directory: Path) -> list[float]:
    """Log-probabilities of 300 tokens from the weights of ``unequal_checkpoint`` in float32."""
    plain = checkpoints.make(directory / "unequal-plain", "--dequantize", "--gate-up-ratio", "1.25")
    return reference.logprobs(reference.load(plain), prompt_tokens(300))


@pytest.fixture(scope="session")
def server(directory: Path, checkpoint: Path) -> Iterator[Server]:
    """The demo server, with the MoE backend left to vLLM's choice."""
    with running_server(checkpoint, directory / "server.log") as running:
        yield running
