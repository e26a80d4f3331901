"""What a checkpoint's model says according to Hugging Face transformers in float32: it shares no code with vLLM."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def load(directory: Path) -> torch.nn.Module:
    """Load a checkpoint of plain weights; every parameter must come from it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: names for kind, names in info.items() if names}
    assert not problems, f"{directory} does not fill the model: {problems}"
    return model.eval()


def logprobs(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    """Return the log-probability of each token but the first, given those before it."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.float()
    return torch.log_softmax(logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0].tolist()


def silence_routed_experts(model: torch.nn.Module) -> None:
    """Zero the down projection of every routed expert, so that they add nothing."""
    silenced = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name and "down" in name and "shared" not in name:
            parameter.data.zero_()
            silenced += 1
    assert silenced, "the model has no routed expert by the expected name"
