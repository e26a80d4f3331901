"""How make_checkpoint.py writes: the same bytes every time, in bounded memory, whole or not at all; what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from . import made_checkpoint as mc
from .made_checkpoint import make_checkpoint

SMALL = [word for name, value in mc.SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
SMALL.append("--no-for-cpu")
MIB = 1 << 20


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = mc.run(tmp_path / name, *SMALL, "--shard-size", "1M")
        assert done.returncode == 0, done.stderr
    assert mc.hashes(tmp_path / "one") == mc.hashes(tmp_path / "two")
    mc.made(tmp_path / "other", seed=1, shard_size=MIB)
    one, other = mc.hashes(tmp_path / "one"), mc.hashes(tmp_path / "other")
    weights = [name for name in one if name.startswith("model-")]
    assert len(weights) > 3
    assert all(one[name] != other[name] for name in weights)
    assert one["tokenizer.json"] == other["tokenizer.json"]


def test_bytes_do_not_depend_on_sharding_or_on_what_was_made_before(tmp_path: Path) -> None:
    whole = mc.made(tmp_path / "whole")
    shards = mc.made(tmp_path / "shards", shard_size=200_000)
    assert whole.keys() == shards.keys()
    assert all(torch.equal(bits(whole[name]), bits(shards[name])) for name in whole)
    recipe = mc.Recipe(mc.small())
    for spec in reversed(list(recipe.inventory())):
        mc.tiles.pool.cache_clear()
        mc.formats.parts.cache_clear()
        for name, tensor in recipe.build(spec).items():
            assert torch.equal(bits(tensor), bits(whole[name])), name
        if "experts" in spec.name and spec.name.endswith("7.w1"):
            break


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = mc.made(tmp_path / "model", shard_size=MIB)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(p.name for p in (tmp_path / "model").glob("*.safetensors")) == files
    for file in files:
        path = tmp_path / "model" / file
        held = [t for name, t in tensors.items() if index["weight_map"][name] == file]
        assert sum(t.numel() * t.element_size() for t in held) <= MIB or len(held) <= 2
        assert path.stat().st_mode & 0o044 == 0o044 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "fp8", "bf16"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_described_is_what_is_built(fmt: str, dequantize: bool) -> None:
    recipe = mc.Recipe(mc.small(), fmt, dequantize)
    for spec in recipe.inventory():
        built = {name: (t.dtype, tuple(t.shape)) for name, t in recipe.build(spec).items()}
        assert built == recipe.describe(spec), spec.name


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    geometry = ["--hidden", 1024, "--intermediate", 512, "--experts-count", 256, "--layers", 1, "--format", "bf16"]
    base = peak_memory(tmp_path / "base", *SMALL, "--format", "bf16")
    peak = peak_memory(tmp_path / "large", *geometry, "--shard-size", "32M")
    total = sum(file.stat().st_size for file in (tmp_path / "large").iterdir())
    print(
        f"{total / MIB:.0f} MiB in shards of 32 MiB: peak {peak / MIB:.0f} MiB, of which {base / MIB:.0f} are the base"
    )
    assert total > 750 * MIB
    assert peak - base < 64 * MIB


def peak_memory(*arguments: object) -> int:
    """Peak resident bytes of a run (of its own memory: getrusage would count what it inherits from this process)."""
    code = "import sys, make_checkpoint; status = make_checkpoint.main(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{mc.SCRIPTS}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "precious").write_text("x")
    assert make_checkpoint.main([str(out), *SMALL]) == 2
    error = capsys.readouterr().err
    assert "not empty" in error
    assert "--force" in error
    assert [p.name for p in out.iterdir()] == ["precious"]
    assert make_checkpoint.main([str(out), *SMALL, "--force"]) == 0
    assert not (out / "precious").exists()
    assert mc.read(out)
    file = tmp_path / "file"
    file.write_text("x")
    assert make_checkpoint.main([str(file), *SMALL, "--force"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert file.read_text() == "x"


def test_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    mc.made(out)
    before = mc.hashes(out)
    build, calls = mc.Recipe.build, []

    def failing(recipe: mc.Recipe, spec: object) -> dict[str, torch.Tensor]:
        calls.append(spec)
        if len(calls) == 100:
            raise OSError("disk on fire")
        return build(recipe, spec)

    monkeypatch.setattr(mc.Recipe, "build", failing)
    with pytest.raises(OSError, match="disk on fire"):
        mc.write(mc.Recipe(mc.small(), seed=1), out, MIB, force=True)
    assert mc.hashes(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_killed_run_is_never_complete_and_does_not_block_the_next(tmp_path: Path) -> None:
    out = tmp_path / "model"
    running = subprocess.Popen([sys.executable, mc.TOOL, out, "--layers", "12", "--shard-size", "2M"])
    partial = tmp_path / "model.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 2:
        assert running.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGSTOP)  # so that it cannot finish meanwhile
    refused = mc.run(out, *SMALL)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert refused.returncode == 2
    assert "another process" in refused.stderr
    assert not out.exists()
    assert not (partial / "config.json").exists()
    assert mc.run(out, *SMALL).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert len(mc.read(out)) > 100
    assert [p.name for p in out.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mc.writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=MIB))
    with pytest.raises(mc.writer.OutputError, match=r"needs 0\.01 GB and its disk has 0\.00 GB free"):
        mc.made(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", 200], "--hidden is 200: it must be a multiple of 128"),
        (["--intermediate", 0], "--intermediate is 0: it must be at least 1"),
        (["--top-k", 65], "--top-k is 65: there are only 64 experts"),
        (["--hash-layers", 5], "--hash-layers is 5: it must lie between 0 and --layers, 4"),
        (["--heads", 7], "--heads is 7: it must be a multiple of --o-groups, 2"),
        (["--vocab", 100], "--vocab is 100: the tokenizer has 512 tokens"),
        (["--experts-count", 8], "--experts-count is 8: it must be one of 64, 128, 256, 384"),
        (["--top-k", 4], "--top-k is 4: it must be one of 6, 8"),
        (["--index-topk", 64], "--index-topk is 64: it must be one of 512"),
        (["--preset", "pro", "--for-cpu"], "--index-topk is 1024: it must be one of 512"),
        (["--shard-size", "lots"], "'lots' is no size"),
        (["--shard-size", "0"], "'0' is no size"),
        (["--gate-up-ratio", "-1"], "-1 must lie between"),
        (["--gate-up-ratio", "nan"], "nan must lie between"),
        (["--input-scale-spread", "0.5"], "0.5 must lie between"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    try:
        status = make_checkpoint.main([str(tmp_path / "model"), *map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "fp8", "bf16"])
def test_files_are_those_of_the_safetensors_library(tmp_path: Path, fmt: str) -> None:
    tensors = mc.made(tmp_path / "model", fmt)
    save_file(tensors, tmp_path / "same", metadata={"format": "pt"})
    written = tmp_path / "model" / "model-00001-of-00001.safetensors"
    assert written.read_bytes() == (tmp_path / "same").read_bytes()


def test_a_tensor_that_is_not_as_described_is_not_written(tmp_path: Path) -> None:
    described = {"a": (torch.float32, (2,)), "b": (torch.uint8, (3,))}
    a, b = {"a": torch.ones(2)}, {"b": torch.ones(3, dtype=torch.uint8)}
    assert list(mc.writer.shard.write(tmp_path / "right", described, [b, a])) == [3, 8]
    for tensors, message in (
        ([a], r"lacks \['b'\]"),
        ([a, {"b": torch.ones(4, dtype=torch.uint8)}], "b is torch.uint8"),
        ([a, b, {"c": torch.ones(1)}], "c is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            list(mc.writer.shard.write(tmp_path / "wrong", described, tensors))
