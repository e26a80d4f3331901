"""Transformers loads the dequantized checkpoint, and its log-probabilities tell a wrong MoE layer from a right one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from . import made_checkpoint as mc

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[9 + (i * 37 + i // 11) % 490 for i in range(200)]])
# Serving is judged by a mean difference of 0.07: faults must lie well above, rounding well below.
FAULT, ROUNDING = 0.12, 0.035


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    directory = tmp_path_factory.mktemp("reference") / "model"
    mc.write(mc.Recipe(mc.make_geometry("tiny"), dequantize=True), directory)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def expected(model: torch.nn.Module) -> torch.Tensor:
    return logprobs(model)


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits.float()
    return torch.log_softmax(logits[0, :-1], -1).gather(-1, TOKENS[0, 1:, None])[:, 0]


def difference(model: torch.nn.Module, expected: torch.Tensor) -> float:
    return (logprobs(model) - expected).abs().mean().item()


def expert_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {
        name: p
        for name, p in model.named_parameters()
        if name.endswith(("experts.gate_up_proj", "down_proj")) and ".experts." in name
    }


def swap_neighbours(model: torch.nn.Module) -> None:
    """What swapped nibbles do."""
    for weight in expert_weights(model).values():
        weight.copy_(weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def gate_scale_for_up(model: torch.nn.Module) -> None:
    """What gate's scale does to an up whose own is 1.25 times as large."""
    for name, weight in expert_weights(model).items():
        if "gate_up" in name:
            weight[:, weight.shape[1] // 2 :] /= 1.25


@pytest.mark.parametrize("fault", [swap_neighbours, gate_scale_for_up])
def test_wrong_weights_show(
    model: torch.nn.Module, expected: torch.Tensor, fault: Callable[[torch.nn.Module], None]
) -> None:
    kept = {name: weight.detach().clone() for name, weight in expert_weights(model).items()}
    assert kept
    try:
        with torch.no_grad():
            fault(model)
        shown = difference(model, expected)
    finally:
        with torch.no_grad():
            for name, weight in expert_weights(model).items():
                weight.copy_(kept[name])
    print(f"{fault.__name__}: {shown:.4f}")
    assert shown > FAULT


def test_squared_routing_weights_show(model: torch.nn.Module, expected: torch.Tensor) -> None:
    def squared(_: torch.nn.Module, args: tuple) -> tuple:
        return args[0], args[1], args[2].square()

    hooks = [layer.mlp.experts.register_forward_pre_hook(squared) for layer in model.model.layers]
    try:
        shown = difference(model, expected)
    finally:
        for hook in hooks:
            hook.remove()
    print(f"squared routing weights: {shown:.4f}")
    assert shown > FAULT


def test_rounding_to_bfloat16_does_not_show(model: torch.nn.Module, expected: torch.Tensor) -> None:
    def rounded(_: torch.nn.Module, __: tuple, output: object) -> object:
        return output.bfloat16().float() if getattr(output, "dtype", None) == torch.float32 else output

    hooks = [
        module.register_forward_hook(rounded)
        for name, module in model.named_modules()
        if name and name != "lm_head" and "rotary" not in name and "gate" not in name.split(".")
    ]
    try:
        shown = difference(model, expected)
    finally:
        for hook in hooks:
            hook.remove()
    print(f"bfloat16: {shown:.4f}")
    assert 0 < shown < ROUNDING
