"""Sizes of a DeepSeek-V4 model, the presets, and what can and cannot be served with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

TILE = 128  # FP8 block scales cover 128 x 128 weights, so every quantized matrix has multiples of it on both sides
MIN_VOCAB = 512  # the size of the tokenizer that is written next to the weights
HEAD_DIM = 512
ROPE_DIM = 64
INDEX_HEAD_DIM = 128
HC_MULT = 4


class GeometryError(ValueError):
    """A combination of sizes that cannot exist, or cannot be served on the asked device."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, all in elements. Field names are those of the command line.

    ``pattern`` is the attention of the first layers by compression ratio (0 sliding window, 4 compressed sparse, 128
    heavily compressed); its last two entries repeat.
    """

    hidden: int
    intermediate: int
    layers: int
    experts_count: int
    top_k: int
    hash_layers: int
    heads: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    index_heads: int
    index_topk: int
    routed_scaling_factor: float
    pattern: tuple[int, ...]
    vocab: int = MIN_VOCAB
    swiglu_limit: float = 10.0
    max_positions: int = 8192

    @property
    def compress_ratios(self) -> list[int]:
        """Compression ratio of each layer."""
        head, tail = self.pattern[:-2], self.pattern[-2:]
        return [head[i] if i < len(head) else tail[(i - len(head)) % 2] for i in range(self.layers)]


# Flash and Pro are the published models with fewer layers and this project's small vocabulary: --layers 43 or 61 with
# --hash-layers 3 and --vocab 129280 make them whole. Tiny exercises every kind of layer.
PRESETS = {
    "tiny": Geometry(
        hidden=256,
        intermediate=256,
        layers=4,
        experts_count=64,
        top_k=6,
        hash_layers=1,
        heads=8,
        q_lora_rank=128,
        o_lora_rank=128,
        o_groups=2,
        index_heads=64,
        index_topk=512,
        routed_scaling_factor=1.5,
        pattern=(0, 4, 128),
    ),
    "flash": Geometry(
        hidden=4096,
        intermediate=2048,
        layers=4,
        experts_count=256,
        top_k=6,
        hash_layers=1,
        heads=64,
        q_lora_rank=1024,
        o_lora_rank=1024,
        o_groups=8,
        index_heads=64,
        index_topk=512,
        routed_scaling_factor=1.5,
        pattern=(0, 0, 4, 128),
    ),
    "pro": Geometry(
        hidden=7168,
        intermediate=3072,
        layers=1,
        experts_count=384,
        top_k=6,
        hash_layers=0,
        heads=128,
        q_lora_rank=1536,
        o_lora_rank=1024,
        o_groups=16,
        index_heads=64,
        index_topk=1024,
        routed_scaling_factor=2.5,
        pattern=(128, 128, 4, 128),
    ),
}


def make_geometry(preset: str, **overrides: float | None) -> Geometry:
    """A preset with some sizes replaced (None keeps the preset's) and checked.

    Raises:
        GeometryError: the sizes do not belong together.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    geometry = dataclasses.replace(PRESETS[preset], **given)
    if "layers" in given and "hash_layers" not in given:
        geometry = dataclasses.replace(geometry, hash_layers=min(geometry.hash_layers, geometry.layers))
    check(geometry)
    return geometry


def check(geometry: Geometry) -> None:
    """Refuse sizes that no server can take.

    Raises:
        GeometryError: with every fault found, one a line.
    """
    g = geometry
    faults = [
        f"--{name.replace('_', '-')} is {getattr(g, name)}: it must be at least 1"
        for name in ("hidden", "intermediate", "layers", "experts_count", "top_k", "heads", "o_groups", "index_heads")
        if getattr(g, name) < 1
    ]
    faults += [
        f"--{name.replace('_', '-')} is {getattr(g, name)}: it must be a multiple of {TILE}, the block of FP8 weights"
        for name in ("hidden", "intermediate", "q_lora_rank", "o_lora_rank")
        if getattr(g, name) < 1 or getattr(g, name) % TILE
    ]
    if g.o_groups >= 1 and g.heads % g.o_groups:
        faults.append(f"--heads is {g.heads}: it must be a multiple of --o-groups, {g.o_groups}")
    if g.top_k > g.experts_count:
        faults.append(f"--top-k is {g.top_k}: there are only {g.experts_count} experts")
    if not 0 <= g.hash_layers <= g.layers:
        faults.append(f"--hash-layers is {g.hash_layers}: it must lie between 0 and --layers, {g.layers}")
    if g.vocab < MIN_VOCAB:
        faults.append(f"--vocab is {g.vocab}: the tokenizer has {MIN_VOCAB} tokens")
    if g.index_topk < 1 or g.max_positions < 1 or not g.swiglu_limit > 0 or not g.routed_scaling_factor > 0:
        faults.append("--index-topk, --max-positions, --swiglu-limit and --routed-scaling-factor must be positive")
    _refuse("This geometry is impossible", faults)


def check_for_cpu(geometry: Geometry) -> None:
    """Refuse sizes that vLLM's CPU build has no kernel for (``hash_topk_cpu`` and the sparse attention's assertions).

    Raises:
        GeometryError: with every fault found, one a line.
    """
    faults = [
        f"--{name.replace('_', '-')} is {getattr(geometry, name)}: it must be one of {', '.join(map(str, allowed))}"
        for name, allowed in (("experts_count", (64, 128, 256, 384)), ("top_k", (6, 8)), ("index_topk", (512,)))
        if getattr(geometry, name) not in allowed
    ]
    _refuse("vLLM's CPU build cannot serve this geometry (--no-for-cpu writes it all the same)", faults)


def _refuse(summary: str, faults: list[str]) -> None:
    if faults:
        raise GeometryError(f"{summary}:\n" + "\n".join(f"  {fault}" for fault in faults))
