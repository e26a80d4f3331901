"""What docs/startup.md says of the layer test's limits: right rows and layers, and planted faults, against them.

``python kernel/tests/layer_test_limits.py rows --intermediate 3072 --count 120000``: rows of W4A4 with changed codes.
``... noise --precision w4a4 --count 2500``: layers of right kernels with the noise that the budget allows.
``... faults --precision w4a4 --count 3``: planted faults in V4-Pro's 7168 x 3072. Each takes some minutes.
``... operations --precision w4a4``: what the references of a layer of one of 8 ranks cost, on tensors without data.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import selftest_cases as cases
import torch
from nvfp4_megamoe.moe.geometry import MoEGeometry
from nvfp4_megamoe.moe.weights import ExpertWeights
from nvfp4_megamoe.selftest import LayerTest
from nvfp4_megamoe.selftest.limits import limits_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRO = MoEGeometry(num_experts=4, num_local_experts=4, top_k=2, hidden=7168, intermediate=3072, swiglu_limit=10.0)
_FAULTS = (
    cases.up_scale_wrong,
    cases.gate_block_lost,
    cases.gate_row_lost,
    cases.down_block_lost,
    cases.output_channel_lost,
    cases.one_experts_scale_wrong,
)
_VALUES_AT_ONCE = 1_000_000


def rows(args: argparse.Namespace) -> None:
    rng = torch.Generator().manual_seed(args.seed)
    at_once = _VALUES_AT_ONCE // args.intermediate
    parts = [cases.moved_and_allowed(at_once, args.intermediate, rng) for _ in range(-(-args.count // at_once))]
    moved, allowed = (torch.cat(part) for part in zip(*parts, strict=True))
    fixed = limits_for("w4a4", args.intermediate, 1).row
    print(f"{len(moved)} rows, most moved {moved.max():.3f}; {(moved > fixed).sum()} beyond {fixed:.4f}, the limit")
    print(f"of a row in which nothing tips over; with their own: nearest {(moved / allowed).max():.2f} of it")
    print(
        "limits of 9 in 10 rows, 999 in 1000 at most:",
        *(f"{allowed.kthvalue(int(q * len(allowed)))[0]:.4f}" for q in (0.9, 0.999)),
    )


def noise(args: argparse.Namespace) -> None:
    worst = 0.0
    for seed in range(args.seed, args.seed + args.count):
        case = cases.Case(torch.Generator().manual_seed(seed))
        backend = cases.NoisyBackend(case.geometry, args.precision, cases.SUM_NOISE[args.precision], case.seed)
        worst = max(worst, cases.nearest(case.report(backend=backend)))
    print(f"{args.precision}, {args.count} layers: at most {worst:.2f} of a limit")


def faults(args: argparse.Namespace) -> None:
    for seed in range(args.seed, args.seed + args.count):
        case = cases.Case(torch.Generator().manual_seed(seed), _PRO)
        print(f"seed {seed}, {args.precision}: right {cases.nearest(case.report(args.precision)):.2f}", flush=True)
        for fault in _FAULTS:
            print(f"  {fault.__name__} {cases.nearest(case.report(args.precision, fault)):.1f}", flush=True)
        wrapped = case.report(args.precision, wrap=cases.one_row_in_256_zero)
        print(f"  one_row_in_256_zero {cases.nearest(wrapped):.1f}", flush=True)


class _Counter(TorchDispatchMode):
    """Operations that make a tensor of the meta device, and the bytes that they read and write."""

    operations = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "meta"]
        if tensors and not func.is_view:
            self.operations += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def operations(args: argparse.Namespace) -> None:
    geometry = MoEGeometry(384, 48, 6, 7168, 3072, 10.0)
    weights = ExpertWeights.empty(48, geometry.hidden, geometry.intermediate, device="meta")
    expert_map = torch.where(torch.arange(384) < 48, torch.arange(384), -1).int()
    backend = SimpleNamespace(name="none", precision=args.precision)
    with _Counter() as counted:
        LayerTest("layer", geometry, weights, backend, expert_map)
    print(f"{args.precision}: {counted.operations} operations, {counted.bytes / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "noise", "faults", "operations"))
    parser.add_argument("--precision", choices=tuple(cases.SUM_NOISE), default="w4a4")
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"rows": rows, "noise": noise, "faults": faults, "operations": operations}[args.what](args)


if __name__ == "__main__":
    main()
