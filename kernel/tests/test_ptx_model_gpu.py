"""The model's own tests with a Hopper GPU in its place: instructions, copies and barriers that both have.

The functions are those of the model's tests, with their inputs and definitions; ``run`` executes on the model, then on
the GPU. Left out: programs with planted faults (the model's to report; a GPU hangs or computes something), what Hopper
lacks, and approximations, for which the last test has bounds.
"""

from __future__ import annotations

import numpy as np
import pytest
import test_ptx_model_instructions as instructions
import test_ptx_model_memory as memory
from ptx_model import hardware, programs
from ptx_model.testing import fresh_seed

# Collected here too, where the fixture below applies.
from test_ptx_model_instructions import (  # noqa: F401
    test_bf16_through_shared_memory,
    test_conversion_to_bf16_rounds_to_even,
    test_conversion_to_e4m3_matches_an_exhaustive_search,
    test_divergent_lanes_join_again,
    test_elect_chooses_one_lane_and_names_it_to_all,
    test_float,
    test_integer,
    test_integer_conversion_extends_by_the_sources_sign,
    test_match_any,
    test_match_of_some_lanes_waits_for_all_of_them,
    test_scoped_registers_and_labels_are_separate,
    test_setp,
    test_shuffle,
    test_wide_products,
)
from test_ptx_model_memory import (  # noqa: F401
    test_atomic_add_counts_every_lane,
    test_bulk_load_arrives_with_its_bytes,
    test_bulk_reduction_adds_in_bfloat16,
    test_bulk_store,
    test_cluster_barrier_and_remote_arrival,
    test_cp_async_fills_with_zeros,
    test_load_from_another_blocks_shared_memory,
    test_multicast_load_counts_at_the_barrier_of_every_block,
    test_vector_and_narrow_accesses,
)

pytestmark = hardware.needs_hopper()


@pytest.fixture(autouse=True)
def on_the_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "approx" in request.node.name and request.function is test_float:
        pytest.skip("an approximation: see test_approximations")
    for module in (programs, instructions, memory):
        monkeypatch.setattr(module, "run", hardware.run)


@pytest.mark.parametrize(("text", "exact"), [("ex2.approx.ftz.f32", np.exp2), ("rcp.approx.ftz.f32", np.reciprocal)])
def test_approximations(text, exact):
    """Within two units in the last place, by which tests of the kernels move the model's."""
    x = np.random.default_rng(fresh_seed()).uniform(0.1, 20, 32).astype(np.float32)
    got = programs.evaluate(text + " {d}, {0}", "b32", ("b32", x.view(np.uint32))).view(np.float32)
    expected = exact(x.astype(np.float64))
    assert (np.abs(got - expected) <= 2 * np.spacing(expected.astype(np.float32))).all()
    assert (got != 0).all()
