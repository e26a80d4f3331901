"""A directory that vLLM can serve with ``--load-format dummy``: configuration and tokenizer of a model, no weights."""

from __future__ import annotations

from pathlib import Path

from checkpoint_maker import config, tokenizer
from checkpoint_maker.geometry import Geometry, make_geometry

PRO_LAYERS, PRO_EXPERTS, PRO_HASH_LAYERS, PRO_VOCABULARY = 61, 384, 3, 129280
POSITIONS = 16384

# Puts the loader on the path of a server, which then replaces vLLM's dummy weights.
PLUGIN = Path(__file__).with_name("plugin")


def pro(experts: int, layers: int = PRO_LAYERS) -> Geometry:
    """DeepSeek-V4-Pro with another number of experts or layers."""
    return make_geometry(
        "pro", layers=layers, experts_count=experts, hash_layers=min(PRO_HASH_LAYERS, layers),
        vocab=PRO_VOCABULARY, max_positions=POSITIONS,
    )  # fmt: skip


def write(directory: Path, geometry: Geometry) -> Path:
    """Write configuration and tokenizer of ``geometry`` in NVFP4 and return ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    config.write(directory, geometry, "nvfp4", False)
    tokenizer.write(directory, geometry.max_positions)
    return directory


def expert_bytes(geometry: Geometry, ranks: int) -> float:
    """Bytes of the routed experts on each of ``ranks`` expert-parallel ranks: half a byte and 1/16 byte a weight."""
    return geometry.layers * geometry.experts_count / ranks * 3 * geometry.hidden * geometry.intermediate * 9 / 16
