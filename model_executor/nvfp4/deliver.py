"""Takes routed experts' tensors out of a stream of weights, straight into their layers, and prepares full layers.

vLLM's DeepSeek-V4 models compare each tensor's name with up to 1152 patterns to find its parameter. Here the name is
taken apart once, and the layer's own ``weight_loader`` does the rest, so shapes and shards are handled as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from nvfp4_megamoe.checkpoint import expert_tensors
from nvfp4_megamoe.errors import CheckpointError
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

EXPERTS = ".ffn.experts."


class ExpertLayers:
    """The NVFP4 routed experts of a model on this rank.

    Attributes:
        loaded: names of the parameters that tensors were loaded into.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = {
            module.layer_name.removesuffix(".routed_experts"): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, RoutedExperts) and _keeps_checkpoint_layout(module)
        }
        self._missing: dict[str, int] = {}
        self.loaded: set[str] = set()

    def __len__(self) -> int:
        return len(self._layers)

    def without_tensors(self) -> list[str]:
        """Layers of which no tensor is expected."""
        return [prefix for prefix in self._layers if prefix not in self._missing]

    def is_local(self, name: str) -> bool | None:
        """Whether this rank holds the expert that the tensor ``name`` (as in the model) is of; None for others."""
        found = self._find(name)
        if found is None:
            return None
        _, _, module, tensor = found
        return module.expert_map_manager.map_global_to_local(tensor.expert) != -1

    def expect(self, names: Iterable[str]) -> None:
        """Say which tensors will come; a layer is prepared when the last of its own has been loaded."""
        for name in names:
            if (found := self._find(name)) is not None:
                self._missing[found[0]] = self._missing.get(found[0], 0) + 1

    def deliver(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        rename: Callable[[str], str | None],
        prepare: Callable[[RoutedExperts], None],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the experts' tensors of ``weights`` and yield the others under the names they came with.

        Args:
            weights: named as in the checkpoint.
            rename: checkpoint's name to model's name.
            prepare: called once for each layer that has all its tensors.

        Raises:
            CheckpointError: a tensor does not fit its parameter.
        """
        for name, tensor in weights:
            found = self._find(rename(name) or "") if EXPERTS in name else None
            if found is None:
                yield name, tensor
                continue
            prefix, path, module, parts = found
            self._load(name, path, module, parts, tensor)
            self._missing[prefix] -= 1
            if not self._missing[prefix]:
                prepare(module)

    def check_complete(self) -> None:
        """Refuse a model with a layer that lacks a tensor.

        Raises:
            CheckpointError: naming the layers.
        """
        incomplete = [f"{prefix} ({count})" for prefix, count in self._missing.items() if count]
        if incomplete:
            raise CheckpointError(
                f"tensors of routed experts did not come: {', '.join(incomplete)}; expected all of them from the "
                "checkpoint. Download it again."
            )

    def _find(self, name: str) -> tuple[str, str, RoutedExperts, expert_tensors.ExpertTensor] | None:
        head, found, rest = name.partition(EXPERTS)
        if not found:
            return None
        prefix = head + EXPERTS.removesuffix(".")
        tensor = expert_tensors.parse(rest)
        if tensor is None or prefix not in self._layers:
            return None
        return prefix, *self._layers[prefix], tensor

    def _load(
        self, name: str, path: str, module: RoutedExperts, parts: expert_tensors.ExpertTensor, tensor: torch.Tensor
    ) -> None:
        stem = "w2" if parts.projection == expert_tensors.DOWN else "w13"
        leaf = f"{stem}_{parts.kind}"
        try:
            arrived = module.weight_loader(
                getattr(module, leaf),
                tensor,
                f"{path}.{leaf}",
                shard_id=parts.projection,
                expert_id=parts.expert,
                return_success=True,
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} does not fit {path}.{leaf} "
                f"{list(getattr(module, leaf).shape)}: {error}. Serve the checkpoint with its own config.json."
            ) from error
        if not arrived:
            raise CheckpointError(
                f"{name} was read, but its expert is not on this rank: reads follow another placement"
            )
        self.loaded.add(f"{path}.{leaf}")


def _keeps_checkpoint_layout(module: RoutedExperts) -> bool:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

    return getattr(module.quant_method, "nvfp4_backend", None) == NvFp4MoeBackend.NVFP4_MEGAMOE
