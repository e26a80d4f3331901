"""Prompt log-probabilities of served checkpoints against float32 references, and faults that the same check rejects.

The tolerance covers what bfloat16 activations and the FP8 KV cache add to W4A16; each fault lands well above it.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import checkpoints, reference
from .support import Server, mean_difference, prompt_logprobs, prompt_tokens, running_server

TOLERANCE = 0.07


def served(model: Path, log: Path, **options: object) -> list[float]:
    with running_server(model, log, **options) as running:
        return prompt_logprobs(running, prompt_tokens(300))


def test_the_projects_own_experts_are_the_ones_that_run(server: Server) -> None:
    log = server.log.read_text()
    assert "Using 'NVFP4_MEGAMOE' NvFp4 MoE backend" in log
    assert "NVFP4 experts run on nvfp4_megamoe: backend cpu, w4a16" in log


@pytest.mark.parametrize("count", [300, 3000])
def test_served_checkpoint_is_right(server: Server, expected: dict[int, list[float]], count: int) -> None:
    difference = mean_difference(prompt_logprobs(server, prompt_tokens(count)), expected[count])
    print(f"mean |difference| over {count} tokens: {difference:.4f}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("edit", [checkpoints.swap_nibbles], ids=lambda edit: edit.__name__)
def test_faulty_checkpoint_is_rejected(
    directory: Path, checkpoint: Path, expected: dict[int, list[float]], edit: Callable[[checkpoints.Tensors], None]
) -> None:
    faulty = checkpoints.edited(checkpoint, directory / edit.__name__, edit)
    difference = mean_difference(served(faulty, directory / f"{edit.__name__}.log"), expected[300])
    print(f"mean |difference| with {edit.__name__}: {difference:.4f}")
    assert difference > TOLERANCE


def test_squared_routing_weights_are_rejected(
    directory: Path, checkpoint: Path, expected: dict[int, list[float]], squaring_plugin: dict[str, str]
) -> None:
    log = directory / "squared.log"
    environment = squaring_plugin | {"MEGA_MOE_LAYER_TEST": "off"}  # which would not let it serve
    difference = mean_difference(served(checkpoint, log, environment=environment), expected[300])
    assert "routing weights are squared" in log.read_text(), "the fault was not planted"
    print(f"mean |difference| with squared routing weights: {difference:.4f}")
    assert difference > TOLERANCE


def test_different_gate_and_up_scales_are_served_right(
    directory: Path, unequal_checkpoint: Path, expected_unequal: list[float]
) -> None:
    difference = mean_difference(served(unequal_checkpoint, directory / "unequal.log"), expected_unequal)
    print(f"mean |difference| with up's scale 1.25 times gate's: {difference:.4f}")
    assert difference <= TOLERANCE


def test_gates_scale_for_up_is_rejected(
    directory: Path, unequal_checkpoint: Path, expected_unequal: list[float]
) -> None:
    faulty = checkpoints.edited(unequal_checkpoint, directory / "gate-for-up", checkpoints.use_gate_scale_for_up)
    difference = mean_difference(served(faulty, directory / "gate-for-up.log"), expected_unequal)
    print(f"mean |difference| with gate's scale for both: {difference:.4f}")
    assert difference > TOLERANCE


def test_two_expert_parallel_ranks_agree_with_one(
    directory: Path, checkpoint: Path, server: Server, expected: dict[int, list[float]]
) -> None:
    log = directory / "two-ranks.log"
    two = served(checkpoint, log, ranks=2)
    one = prompt_logprobs(server, prompt_tokens(300))
    print(f"mean |difference| of two ranks to one: {mean_difference(two, one):.4f}")
    assert mean_difference(two, expected[300]) <= TOLERANCE
    assert mean_difference(two, one) <= TOLERANCE, "both sum in another order than the reference, and than each other"
    assert "Worker_TP1_EP1" in log.read_text(), "the second rank must hold experts of its own"


def test_two_data_parallel_engines_share_the_experts(
    directory: Path, checkpoint: Path, expected: dict[int, list[float]]
) -> None:
    """Each engine's tokens visit the other's experts, whether the other has as many, fewer, or none of its own."""
    log = directory / "data-parallel.log"
    arguments = ("--data-parallel-size", "2", "--enable-expert-parallel", "--no-enable-prefix-caching")
    with running_server(checkpoint, log, *arguments) as running, ThreadPoolExecutor(4) as pool:
        alone = prompt_logprobs(running, prompt_tokens(300))
        counts = [300, 100, 170, 300, 130, 110, 300, 210]
        together = list(pool.map(lambda count: prompt_logprobs(running, prompt_tokens(count)), counts))
        metrics = urllib.request.urlopen(f"{running.base_url}/metrics", timeout=60).read().decode()
    served_by = {
        line.split('engine="')[1][0]
        for line in metrics.splitlines()
        if line.startswith("vllm:prompt_tokens_total{") and float(line.rsplit(" ", 1)[1]) > 0
    }
    assert served_by == {"0", "1"}, "one engine had all the requests"
    assert mean_difference(alone, expected[300]) <= TOLERANCE
    for count, found in zip(counts, together, strict=True):
        assert mean_difference(found, expected[300][: count - 1]) <= TOLERANCE, count
    placed = [line for line in log.read_text().splitlines() if "Local/global number of experts: 32/64" in line]
    assert len({line.split("[EP Rank ")[1][0] for line in placed}) == 2, "each engine must hold half of the experts"


@pytest.fixture(scope="session")
def squaring_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with a vLLM plugin that squares the routing weights on their way into the layer."""
    root = tmp_path_factory.mktemp("plugin")
    (root / "squaring.py").write_text(
        "import logging\n"
        "from nvfp4_megamoe.moe import layer\n"
        "def install():\n"
        "    original = layer.MoELayer.__call__\n"
        "    def squared(self, x, topk_ids, topk_weights, *rest, **options):\n"
        "        return original(self, x, topk_ids, topk_weights.square(), *rest, **options)\n"
        "    layer.MoELayer.__call__ = squared\n"
        "    print('routing weights are squared', flush=True)\n"
    )
    info = root / "squaring-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: squaring\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nsquaring = squaring:install\n")
    return {"PYTHONPATH": str(root)}


def test_static_experts_return_zeros(directory: Path, checkpoint: Path) -> None:
    log = directory / "static.log"
    switches = {"MEGA_MOE_STATIC": "1", "MEGA_MOE_DEBUG": "1"}
    without_experts = served(checkpoint, log, environment=switches)
    model = reference.load(checkpoints.make(directory / "static-plain", "--dequantize"))
    reference.silence_routed_experts(model)
    assert mean_difference(without_experts, reference.logprobs(model, prompt_tokens(300))) <= TOLERANCE
    text = log.read_text()
    assert "MEGA_MOE_STATIC=1 is set: routed experts return ZEROS" in text
    assert "MEGA_MOE_DEBUG=1 is set" in text
    assert "weight_scale_2 gate" in text


def test_skipped_attention_leaves_no_memory_of_earlier_tokens(directory: Path, checkpoint: Path) -> None:
    log = directory / "skip.log"
    switches = {"SKIP_ATTENTION": "1", "MEGA_MOE_DEBUG": "1"}
    tokens = prompt_tokens(40)
    with running_server(checkpoint, log, environment=switches) as running:
        whole = prompt_logprobs(running, tokens)
        rest = prompt_logprobs(running, tokens[20:])
    assert whole[20:] == pytest.approx(rest, abs=0.05)
    text = log.read_text()
    assert "SKIP_ATTENTION=1 is set: attention returns ZEROS" in text
    assert "slots of which" in text
