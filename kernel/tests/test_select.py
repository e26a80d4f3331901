from __future__ import annotations

import sys
import types

import pytest
import torch
from nvfp4_megamoe.backends import select
from nvfp4_megamoe.backends.cpu.backend import CpuBackend
from nvfp4_megamoe.errors import UnsupportedError
from nvfp4_megamoe.moe.geometry import MoEGeometry

GOOD = MoEGeometry(8, 8, 3, 64, 48, 10.0)
BAD = MoEGeometry(8, 8, 3, 72, 48, 10.0)
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Other:
    """A backend for everything on a GPU."""

    name = "other"
    precisions = ("w4a8",)

    def __init__(self, geometry, precision=None):
        self.precision = precision or "w4a8"

    @classmethod
    def unsupported_reason(cls, geometry, device):
        return None if device.type == "cuda" else "it wants a GPU"


@pytest.fixture
def two_backends(monkeypatch):
    module = types.ModuleType("other_backend")
    module.Other = Other
    monkeypatch.setitem(sys.modules, "other_backend", module)
    monkeypatch.setattr(select, "BACKENDS", {"other": "other_backend:Other", **select.BACKENDS})


def test_cpu():
    backend = select.select(GOOD, CPU)
    assert (type(backend), backend.precision) == (CpuBackend, "w4a16")
    assert select.select(GOOD, CPU, "w4a4", name="cpu").precision == "w4a4"
    assert select.unsupported_reason(GOOD, CPU) is None


def test_first_that_supports_the_layer(two_backends):
    assert isinstance(select.select(GOOD, CPU), CpuBackend)
    assert isinstance(select.select(BAD, GPU), Other)
    assert isinstance(select.select(GOOD, CPU, "w4a4"), CpuBackend)


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        ((BAD, CPU), ["other: it wants a GPU", "cpu: hidden must be a multiple of 16"]),
        ((GOOD, GPU, "w4a16"), ["other: precision 'w4a16' is not one of w4a8", "cpu: it computes on the CPU"]),
    ],
)
def test_every_reason_is_named(two_backends, arguments, reasons):
    with pytest.raises(UnsupportedError) as raised:
        select.select(*arguments)
    for reason in reasons:
        assert reason in str(raised.value)
    assert "Taken by name alone: sm100" in str(raised.value)
    assert select.unsupported_reason(*arguments) == str(raised.value)


def test_a_named_backend_is_the_only_one_considered(two_backends):
    assert select.unsupported_reason(GOOD, CPU, name="other") is not None
    with pytest.raises(UnsupportedError, match="wants a GPU"):
        select.select(GOOD, CPU, name="other")
    with pytest.raises(UnsupportedError, match="no backend 'sm42'; expected one of: other, cpu"):
        select.select(GOOD, CPU, name="sm42")


def test_a_gpu_library_that_is_missing_is_named_with_the_command_that_builds_it(monkeypatch, tmp_path):
    hopper = MoEGeometry(8, 8, 3, 256, 256, 10.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    library = tmp_path / "sm90.so"
    monkeypatch.setattr("nvfp4_megamoe.backends.sm90.library.library_path", lambda: library)
    reason = select.unsupported_reason(hopper, GPU)
    assert f"{library} does not exist" in reason and "python -m nvfp4_megamoe.backends.sm90.build" in reason
    library.touch()
    assert select.unsupported_reason(hopper, GPU) is None


def test_a_backend_that_is_only_taken_by_name(monkeypatch, two_backends):
    monkeypatch.setattr(select, "ONLY_BY_NAME", {"unproven": "other_backend:Other"})
    monkeypatch.setattr(select, "BACKENDS", {"cpu": select.BACKENDS["cpu"]})
    assert isinstance(select.select(GOOD, GPU, name="unproven"), Other)
    with pytest.raises(UnsupportedError) as raised:
        select.select(GOOD, GPU)
    assert "unproven: " not in str(raised.value)


def test_sm100_is_known_by_name_alone():
    assert "sm100 backend needs a Blackwell GPU" in select.unsupported_reason(GOOD, CPU, name="sm100")
    assert "sm100: " not in select.unsupported_reason(BAD, CPU)
