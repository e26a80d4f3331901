"""What the entrypoint reads from vLLM's flags, how it runs its children, and the exit codes that it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import entrypoint  # noqa: E402
from launch import flags, serve  # noqa: E402


@pytest.mark.parametrize(
    "arguments, ranks, here",
    [
        ("", 1, 1),
        ("--tensor-parallel-size 8 --enable-expert-parallel", 8, 8),
        ("--tensor_parallel_size=4 -pp 2", 8, 8),
        ("-tp 8 --served-model-name name --port 8000", 8, 8),
        ("--data-parallel-size 8", 8, 8),
        ("-dp 16 -dpl 8 --headless", 16, 8),
        ("-dp 16 --data-parallel-rank 3", 16, 1),
        ("-tp 16 --nnodes 2 --node-rank 1", 16, 8),
    ],
)
def test_ranks_come_from_the_parallel_sizes(tmp_path: Path, arguments: str, ranks: int, here: int) -> None:
    for words in ([str(tmp_path), *arguments.split()], [*arguments.split(), "--model", str(tmp_path)]):
        serving = flags.read(words)
        assert (serving.model, serving.ranks, serving.ranks_here) == (tmp_path, ranks, here)


def test_every_flag_that_is_read_is_one_of_vllms() -> None:
    """A flag that vLLM renamed would be ignored here, and the preflight would check for one rank."""
    known = _vllm_flags()
    wanted = {name for action in flags._parser()._actions for name in action.option_strings}
    assert wanted <= known, wanted - known


def test_context_and_memory_share_reach_the_preflight(tmp_path: Path) -> None:
    serving = flags.read([str(tmp_path), "--max-model-len", "128K", "--gpu-memory-utilization", "0.9", "-tp", "2"])
    command = entrypoint.preflight_command(serving, Path("/cache"))
    pairs = dict(zip(command[3::2], command[4::2], strict=True))
    assert pairs == {
        "--cache": "/cache",
        "--ranks": "2",
        "--ranks-here": "2",
        "--max-model-len": "131072",
        "--memory-share": "0.9",
    }


@pytest.mark.parametrize("text, tokens", [("4096", 4096), ("32k", 32000), ("1.5K", 1536), ("auto", None), ("-1", None)])
def test_lengths_in_vllms_notation(text: str, tokens: int | None) -> None:
    assert flags.length(text) == tokens


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], "no model"),
        (["--config", "serve.yaml"], "--config without a model"),
        (["{tmp}/nothing"], "/nothing is not a directory"),
        (["{tmp}", "-tp", "eight"], "--tensor-parallel-size"),
        (["{tmp}", "-tp", "0"], "--tensor-parallel-size"),
        (["{tmp}", "--max-model-len", "long"], "--max-model-len long"),
        (["{tmp}", "--gpu-memory-utilization", "most"], "--gpu-memory-utilization"),
    ],
)
def test_unusable_flags_are_named_and_end_with_2(tmp_path: Path, arguments: list[str], names: str) -> None:
    result = _run([word.format(tmp=tmp_path) for word in arguments])
    assert result.returncode == entrypoint.UNUSABLE
    assert names in result.stderr


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    result = _run([str(tmp_path)], MEGA_MOE_PREFLIGHT="lenient")
    assert result.returncode == entrypoint.UNUSABLE and "expected strict, report, off" in result.stderr


@pytest.mark.parametrize("mode, status", [("strict", entrypoint.REFUSED), ("report", 7), ("off", 7)])
def test_the_preflight_decides_as_asked(tmp_path: Path, mode: str, status: int) -> None:
    """An empty directory is no checkpoint: the preflight refuses it. The server here is a program that ends with 7."""
    result = _main(tmp_path, "import sys; sys.exit(7)", mode)
    assert result.returncode == status, result.stderr
    assert ("the preflight refused" in result.stderr) == (mode == "strict")
    assert ("NOT ready to start" in result.stdout) == (mode != "off")


@pytest.mark.parametrize(
    "server, status",
    [
        ("pass", 11),
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.fork() and os._exit(5); import time; time.sleep(60)", 5),
    ],
    ids=["ends with 0", "fails", "is killed", "leaves a child"],
)
def test_an_end_without_an_order_is_never_0(tmp_path: Path, server: str, status: int) -> None:
    began = time.monotonic()
    result = _main(tmp_path, server, "off")
    assert result.returncode == status, result.stderr
    assert ("a rank died" in result.stderr) == (status == 11)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "lambda *_: sys.exit(0)"])
def test_an_order_reaches_the_server_and_ends_with_0(tmp_path: Path, number: signal.Signals, handler: str) -> None:
    server = (
        f"import signal, sys, time; signal.signal({int(number)}, {handler}); print('up', flush=True); time.sleep(60)"
    )
    with _started(tmp_path, server, "off") as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait(30) == 0


def test_orphans_are_reaped_and_the_rest_of_the_session_ends(tmp_path: Path) -> None:
    """A rank that outlives its server would keep its GPU."""
    mark = tmp_path / "rank"
    server = (
        "import os, sys, time\n"
        f"if os.fork() == 0: open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)\n"
        f"while not os.path.exists({str(mark)!r}) or not open({str(mark)!r}).read(): time.sleep(0.01)\n"
        "sys.exit(4)"
    )
    assert _main(tmp_path, server, "off").returncode == 4
    deadline = time.monotonic() + 10
    while _alive(int(mark.read_text())):
        assert time.monotonic() < deadline, "the server's child still runs"
        time.sleep(0.05)


@pytest.mark.parametrize("settings, left", [({}, []), ({"MEGA_MOE_RUN_ID": "same"}, ["old-rank0.json"])])
def test_an_earlier_start_is_forgotten(tmp_path: Path, settings: dict[str, str], left: list[str]) -> None:
    status = tmp_path / "status"
    status.mkdir()
    (status / "old-rank0.json").write_text("{}")
    result = _run([str(tmp_path)], MEGA_MOE_STATUS_DIR=str(status), **settings)
    assert result.returncode == entrypoint.REFUSED
    assert [path.name for path in status.iterdir()] == left


def test_the_server_gets_caches_and_the_users_settings_win(tmp_path: Path) -> None:
    base = {"MEGA_MOE_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": "/mine", "OMP_NUM_THREADS": "3"}
    settings = entrypoint.server_environment(base, tmp_path, 1)
    assert settings["NVFP4_MEGAMOE_CACHE"].startswith(str(tmp_path))
    assert settings["TRITON_CACHE_DIR"] == "/mine" and settings["OMP_NUM_THREADS"] == "3"
    assert settings["VLLM_CPU_OMP_THREADS_BIND"] == "nobind", "the tests' vLLM is the CPU build"


def _vllm_flags() -> set[str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return {name for action in make_arg_parser(FlexibleArgumentParser())._actions for name in action.option_strings}


def _environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings}


def _run(arguments: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "entrypoint.py"), *arguments]
    return subprocess.run(command, env=_environment(**settings), capture_output=True, text=True, timeout=120)


def _command(directory: Path, server: str) -> list[str]:
    """The entrypoint with ``server``, Python source, in the place of vLLM."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import entrypoint\n"
        f"entrypoint.serve.command = lambda arguments: [sys.executable, '-c', {server!r}]\n"
        f"sys.exit(entrypoint.main([{str(directory)!r}]))"
    )
    return [sys.executable, "-c", code]


def _main(directory: Path, server: str, mode: str) -> subprocess.CompletedProcess[str]:
    settings = _environment(MEGA_MOE_PREFLIGHT=mode, MEGA_MOE_CACHE_DIR=str(directory / "cache"))
    return subprocess.run(_command(directory, server), env=settings, capture_output=True, text=True, timeout=120)


def _started(directory: Path, server: str, mode: str) -> subprocess.Popen[str]:
    settings = _environment(MEGA_MOE_PREFLIGHT=mode)
    return subprocess.Popen(_command(directory, server), env=settings, stdout=subprocess.PIPE, text=True)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_servers_command_is_vllm_serve_with_the_flags() -> None:
    assert serve.command(["/models/x", "-tp", "8"])[-4:] == ["serve", "/models/x", "-tp", "8"]
