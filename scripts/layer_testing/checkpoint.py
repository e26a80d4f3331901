"""One rank's experts of one layer at a time from an NVFP4 checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from nvfp4_megamoe.checkpoint import expert_tensors as et
from nvfp4_megamoe.checkpoint.index import read_index, read_json
from nvfp4_megamoe.checkpoint.validate import CONFIG_FILE, check_checkpoint
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights
from safetensors import safe_open


class Source:
    """A checked checkpoint, seen by one expert-parallel rank, which has a run of consecutive experts as in vLLM."""

    def __init__(self, directory: Path, ranks: int, rank: int) -> None:
        """Check index, headers and geometry.

        Raises:
            CheckpointError: as ``check_checkpoint``.
            ValueError: there is no such rank.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"--rank {rank}: expected 0 to {ranks - 1}, for --ranks {ranks}")
        summary = check_checkpoint(directory, expert_parallel_size=ranks)
        config = read_json(directory / CONFIG_FILE)
        local = summary.experts // ranks
        self.directory, self.ranks, self.rank = directory, ranks, rank
        self.expert_ids = list(range(rank * local, (rank + 1) * local))
        self.geometry = MoEGeometry(
            num_experts=summary.experts,
            num_local_experts=local,
            top_k=int(config["num_experts_per_tok"]),
            hidden=summary.hidden,
            intermediate=summary.intermediate,
            swiglu_limit=config.get("swiglu_limit"),
        )
        self._index = read_index(directory)
        self.layers = [layer for layer in range(summary.layers) if self._name(layer, 0) in self._index.files]

    def chosen(self, layers: list[int] | None) -> list[int]:
        """``layers``, or all with NVFP4 experts.

        Raises:
            ValueError: one of them has none.
        """
        unknown = sorted(set(layers or ()) - set(self.layers))
        if unknown:
            raise ValueError(f"{self.directory}: layer(s) {unknown} have no NVFP4 experts; layers {self.layers} have")
        return self.layers if layers is None else layers

    def read(self, layer: int, device: torch.device) -> ExpertWeights:
        """This rank's experts of ``layer``, every value checked, on ``device``.

        Raises:
            CheckpointError: naming a tensor that cannot be served.
        """
        prefix = f"layers.{layer}.ffn.experts"
        names = [
            f"{prefix}.{expert}.{projection}.{kind}"
            for expert in self.expert_ids
            for projection in et.PROJECTIONS
            for kind in et.DTYPES
        ]
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._index.files[name], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with safe_open(self.directory / file, framework="pt", device=str(device)) as shard:
                tensors |= {name: shard.get_tensor(name) for name in wanted}
        return ExpertWeights.from_checkpoint(
            tensors, prefix, self.expert_ids, self.geometry, lambda name: self._index.files[name]
        )

    def expert_map(self, device: torch.device) -> torch.Tensor | None:
        """int32 [experts], as ``MoELayer`` takes it; None where this rank has them all."""
        if self.ranks == 1:
            return None
        mapped = torch.full((self.geometry.num_experts,), -1, dtype=torch.int32)
        mapped[self.expert_ids] = torch.arange(len(self.expert_ids), dtype=torch.int32)
        return mapped.to(device)

    @staticmethod
    def _name(layer: int, expert: int) -> str:
        return f"layers.{layer}.ffn.experts.{expert}.{et.GATE}.{et.BLOCK_SCALE}"
