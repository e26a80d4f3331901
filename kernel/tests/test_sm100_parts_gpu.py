"""Plan, quantization and sum of the SM100 backend, compiled for Hopper, on a Hopper GPU against their references.

They go through the backend's own launcher: objects, arguments, clusters and dependent launches as on a B200.
``HOPPER_PARTS``: directory that ``hopper_parts.py`` wrote; without it they are compiled here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_megamoe.backends.sm100.driver import DriverLauncher
from nvfp4_megamoe.backends.sm100.plan import CLUSTER, MAX_EXPERTS, Plan, plan_launch, plan_shapes
from nvfp4_megamoe.numerics import nvfp4
from ptx_model import hardware
from ptx_model.reference_plan import make_plan
from ptx_model.testing import needs_compiler
from test_sm100_plan import IN_A_CLUSTER, ROUTINGS, UNWRITTEN, differences, uniform

pytestmark = [hardware.needs_hopper(), *([] if "HOPPER_PARTS" in os.environ else [needs_compiler])]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> DriverLauncher:
    directory = os.environ.get("HOPPER_PARTS")
    if directory is None:
        directory = str(tmp_path_factory.mktemp("parts"))
        script = Path(__file__).with_name("hopper_parts.py")
        subprocess.run([sys.executable, str(script), directory], check=True)
    return DriverLauncher(torch.device("cuda:0"), Path(directory))


def executed(launcher, ids: torch.Tensor, expert_map, experts: int, one_scale: bool, name: str | None = None) -> Plan:
    shapes = plan_shapes(*ids.shape, experts, one_scale)
    plan = Plan(**{key: torch.full(shape, UNWRITTEN, dtype=torch.int32).cuda() for key, shape in shapes.items()})
    on_device = None if expert_map is None else expert_map.cuda()
    chosen, blocks, args = plan_launch(plan, ids.cuda(), on_device, experts, one_scale)
    if name is not None:
        chosen, blocks = name, CLUSTER if name == "plan_cluster" else 1
    launcher.launch(chosen, blocks, args)
    return Plan(*(tensor.cpu() for tensor in plan))


@pytest.mark.parametrize(
    ("routing", "name"),
    [(routing, "plan_one") for routing in ROUTINGS] + [(routing, "plan_cluster") for routing in IN_A_CLUSTER],
)
@pytest.mark.parametrize("one_scale", [True, False])
def test_plan(rng, launcher, routing, name, one_scale):
    ids, experts = ROUTINGS[routing](rng)
    expected = make_plan(ids, None, experts, one_scale)
    for dtype in (torch.int64, torch.int32):
        for _ in range(20):
            assert differences(executed(launcher, ids.to(dtype), None, experts, one_scale, name), expected) == []


@pytest.mark.parametrize("tokens", [1, 682, 683, 8192])
@pytest.mark.parametrize("experts", [48, 384, MAX_EXPERTS])
def test_plan_with_an_expert_map(rng, launcher, tokens, experts):
    known = 2 * experts
    ids = torch.rand(tokens, known + 3, generator=rng).topk(6).indices - 2
    expert_map = torch.full((known,), -1, dtype=torch.int32)
    expert_map[torch.randperm(known, generator=rng)[:experts]] = torch.arange(experts, dtype=torch.int32)
    expected = make_plan(ids, expert_map, experts, False)
    for _ in range(5):
        assert differences(executed(launcher, ids, expert_map, experts, False), expected) == []


@pytest.mark.parametrize("columns", [256, 4096, 7168])
def test_quantization_equals_the_reference_bit_for_bit(rng, launcher, columns):
    """Zero blocks, tiny and huge rows, values on the boundary of two codes; a row without a token stays as it is."""
    x = torch.randn(300, columns, generator=rng).bfloat16()
    x[0, :16], x[1], x[2] = 0, x[1] * 1e-4, x[2] * 1e4
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(columns // 8)
    x[3] = steps * torch.where(torch.rand(columns, generator=rng) < 0.5, -1.0, 1.0)
    given = torch.rand(5, generator=rng) * 1e-3 + 1.5e-3
    given[0] = 1 / 448
    inverse = 1 / given
    scales = torch.stack((inverse, 1 / inverse), 1)
    source = torch.stack((torch.randint(0, 300, (700,), generator=rng), torch.randint(0, 5, (700,), generator=rng)), 1)
    source[:4, 0], source[3, 1], source[10:20, 0] = torch.arange(4), 0, -1
    codes = torch.full((700, columns // 2), 0xA5, dtype=torch.uint8).cuda()
    block_scales = torch.full((700, columns // 16), 0xA5, dtype=torch.uint8).cuda()
    arguments = [x.cuda(), source.int().cuda(), scales.cuda(), codes, block_scales, columns]
    launcher.launch("quantize_rows", 700, arguments)
    codes, block_scales = codes.cpu(), block_scales.cpu()
    for row, (token, expert) in enumerate(source.tolist()):
        if token < 0:
            assert codes[row].eq(0xA5).all() and block_scales[row].eq(0xA5).all()
            continue
        expected = nvfp4.quantize(x[token], given[expert])
        assert torch.equal(block_scales[row], expected.block_scale.view(torch.uint8)), (row, token)
        assert torch.equal(codes[row], expected.packed), (row, token)


@pytest.mark.parametrize("columns", [8, 4096, 7168])
def test_sum_is_in_the_order_of_choices(rng, launcher, columns):
    """Bit for bit, also where a row that does not count holds NaN, and where a token has none."""
    tokens, top_k = 500, 6
    rows = torch.randn(tokens, top_k, columns, generator=rng).bfloat16()
    here = torch.rand(tokens, top_k, generator=rng) < 0.6
    here[0] = False
    expected = torch.zeros(tokens, columns)
    for choice in range(top_k):
        expected = torch.where(here[:, choice, None], expected + rows[:, choice].float(), expected)
    rows[~here] = torch.nan
    out = torch.full((tokens, columns), torch.nan, dtype=torch.bfloat16).cuda()
    arguments = [rows.view(-1, columns).cuda(), here.int().flatten().cuda(), out, top_k, columns]
    launcher.launch("sum_slots", tokens, arguments)
    assert torch.equal(out.cpu().view(torch.int16), expected.bfloat16().view(torch.int16))


def test_a_wrong_plan_shows(rng, launcher):
    """Negative control: a reference for another routing is not what the GPU computed."""
    ids = uniform(rng, 300, 6, 48)
    got = executed(launcher, ids, None, 48, False)
    other = ids.clone()
    other[17] = (other[17] + 1) % 48
    assert differences(got, make_plan(other, None, 48, False)) != []
