"""How far right and wrong experts move what deep models of random weights say: python -m tests.serving.depth_control.

Serves DeepSeek-V4 of hidden size 256 on the CPU, with the weights that bench_expert_parallel.py makes in place, and
compares prompt log-probabilities with those of the same model whose experts' scales are 1.002 times as large, which is
the size of bfloat16's rounding, and whose codes have their nibbles swapped. This is what compare.LEAST_CORRELATION and
the limits for few layers stand on. Two cores: 2 minutes for 4 layers, 5 for 61.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from checkpoint_maker.geometry import make_geometry  # noqa: E402
from serve_cpu import server_environment  # noqa: E402
from serving_bench import compare, whole_model  # noqa: E402
from serving_bench.server import end_servers_with_this_process, server  # noqa: E402

FLAGS = ("--load-format", "dummy", "--tokenizer-mode", "deepseek_v4", "--enforce-eager", "--max-model-len", "2048")
# Experts of a small hidden size weigh as much as V4-Pro's with larger scales: a product of length K grows by sqrt(K).
WEIGHT = 4.3
VARIANTS = {"reference": (1.0, False), "scales times 1.002": (1.002, False), "nibbles swapped": (1.0, True)}

PLUGIN = """\
import os

from vllm.model_executor.nvfp4 import parameters


def install():
    parameters._DUMMY_WEIGHT_SCALE_2 *= float(os.environ["CONTROL_SCALE"])
    fill = parameters.fill_dummy

    def fill_and_swap(layer):
        fill(layer)
        for name in ("w13_weight", "w2_weight"):
            codes = getattr(layer, name).data
            codes.copy_((codes >> 4) | (codes << 4))

    if os.environ["CONTROL_SWAP"] == "1":
        parameters.fill_dummy = fill_and_swap
"""


def write_plugin(folder: Path) -> Path:
    """A vLLM plugin that changes dummy experts as the environment says; ``folder`` goes on the path."""
    about = folder / "depth_control_plugin-0.dist-info"
    about.mkdir(parents=True)
    (folder / "depth_control_plugin.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: depth-control-plugin\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\ndepth_control = depth_control_plugin:install\n")
    return folder


def answers(layers: int, directory: Path, name: str) -> dict[str, list]:
    """What one variant of the model says."""
    scale, swap = VARIANTS[name]
    geometry = make_geometry(
        "tiny", layers=layers, hash_layers=min(whole_model.PRO_HASH_LAYERS, layers), max_positions=4096
    )
    model = whole_model.write(directory / f"{layers}-layers", geometry)
    environment = server_environment(sorted(os.sched_getaffinity(0)), 1)
    environment |= {"CONTROL_SCALE": str(WEIGHT * scale), "CONTROL_SWAP": str(int(swap)), "VLLM_CPU_KVCACHE_SPACE": "4"}
    label = f"{layers}-{name.replace(' ', '-')}"
    path = [directory / "plugin", whole_model.PLUGIN]
    with server(label, model, FLAGS, directory, path=path, environment=environment) as running:
        running.start(900)
        return compare.answers(running.base_url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, whole_model.PRO_LAYERS])
    arguments = parser.parse_args()
    end_servers_with_this_process()
    print("| layers | experts | mean difference | correlation | equal greedy tokens |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_plugin(directory / "plugin")
        for layers in arguments.layers:
            reference = answers(layers, directory, "reference")
            for variant in list(VARIANTS)[1:]:
                found = compare.difference(answers(layers, directory, variant), reference)
                row = f"{found['mean']:.3f} | {found['correlation']:.2f} | {found['greedy_equal_tokens']}"
                print(f"| {layers} | {variant} | {row} |", flush=True)


if __name__ == "__main__":
    main()
