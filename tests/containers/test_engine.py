"""The shipped Dockerfile and compose file on a real engine: built, served, watched, scraped, killed and stopped.

The bases are stand-ins (standin.py), so this proves neither the real base image nor GPUs: what it proves is that the
files build, that the patches apply to vLLM, and that containers, volumes, users, ports and signals work together.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .checks import expressions
from .engine import Engine
from .standin import GPU_BASE, REPOSITORY

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]
GPU_IMAGE, CPU_IMAGE = "deepseek-v4-nvfp4:0.1.0", "deepseek-v4-nvfp4:0.1.0-cpu"
API, STATUS, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:8001", "http://127.0.0.1:9090"
MODEL = "deepseek-v4-tiny"


@pytest.fixture(scope="module")
def gpu_image(engine: Engine, bases: None) -> str:
    engine.docker(*_build("gpu", GPU_IMAGE), "--build-arg", "REQUIRE_KERNELS=none", REPOSITORY)
    return GPU_IMAGE


def _build(target: str, tag: str) -> list[str]:
    """``--network=none``: what the bases have must be enough."""
    return ["build", "--network=none", "--progress=plain", "--target", target, "--tag", tag]


def test_a_gpu_image_without_kernels_is_an_error_unless_allowed(engine: Engine, bases: None) -> None:
    result = engine.docker(*_build("gpu", "refused"), REPOSITORY, check=False)
    assert result.returncode != 0
    assert "sm90: NOT built: nvcc not found" in result.stdout
    assert "sm90, sm100 required but not built" in result.stdout


def test_the_gpu_image_says_what_it_is(engine: Engine, gpu_image: str) -> None:
    config = json.loads(engine.docker("image", "inspect", gpu_image).stdout)[0]["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["version"] == "0.1.0" and labels["licenses"] == "Apache-2.0" and labels["name"] == GPU_BASE
    assert config["User"] == "2000:0" and config["Healthcheck"]["Test"][0] == "CMD"
    assert config["ExposedPorts"].keys() == {"8000/tcp", "8001/tcp"}
    kernels = _in(engine, gpu_image, "print(open('/opt/nvfp4-megamoe/kernels.json').read())")
    assert json.loads(kernels)["sm90"]["built"] is False


@pytest.mark.parametrize("user", ["2000:0", "54321:0"], ids=["its user", "any user of group 0"])
def test_the_gpu_image_is_patched_and_its_user_writes_where_it_must(engine: Engine, gpu_image: str, user: str) -> None:
    verified = engine.docker(
        *("run", "--rm", "--user", user, "--cap-drop=ALL", "--entrypoint", "python3", gpu_image),
        *("scripts/patch_vllm.py", "verify"),
    )
    assert "files are as the repository has them" in verified.stdout
    write = "import os; [open(os.path.join(d, 'x'), 'w') for d in ('/cache', '/run/mega-moe', os.environ['HOME'])]"
    _in(engine, gpu_image, write, "--user", user, "--cap-drop=ALL")
    with pytest.raises(AssertionError, match="Permission denied"):
        _in(engine, gpu_image, "open('/opt/nvfp4-megamoe/scripts/x', 'w')", "--user", user, "--cap-drop=ALL")


def test_a_base_with_a_changed_vllm_does_not_build(engine: Engine, gpu_image: str, tmp_path: Path) -> None:
    """Patches must never be laid over a vLLM that they were not written for."""
    file = "vllm/model_executor/layers/fused_moe/oracle/nvfp4.py"
    changed = f"RUN echo '# changed' >> /opt/venv/lib/python3.11/site-packages/{file}"
    (tmp_path / "Dockerfile").write_text(f"FROM {GPU_BASE}\n{changed}\n")
    engine.docker("build", "--tag", "changed", tmp_path)
    build = [*_build("gpu", "refused"), "--build-arg", "BASE_IMAGE=changed", "--build-arg", "REQUIRE_KERNELS=none"]
    result = engine.docker(*build, REPOSITORY, check=False)
    assert result.returncode != 0 and file in result.stdout


@pytest.fixture(scope="module")
def stack(engine: Engine, bases: None) -> Iterator[list[dict]]:
    """The CPU profile and Prometheus, built, up and healthy; the answers of the status service while it came up."""
    answers: list[dict] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            code, text = engine.fetch(f"{STATUS}/startup")
            if code is not None:
                answers.append(json.loads(text))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _compose(engine, "up", "--detach", "--wait", "--wait-timeout", "400", "vllm-cpu", "status-cpu", "prometheus")
        # The service looks every second: it may see that the server is ready after the engine does.
        deadline = time.monotonic() + 60
        while not any(answer["state"] == "ready" for answer in answers) and time.monotonic() < deadline:
            time.sleep(0.1)
        done.set()
        watcher.join()
        yield answers
    finally:
        done.set()
        print(_compose(engine, "logs", "--tail", "60", check=False))
        _compose(engine, "down", "--volumes", "--timeout", "10", check=False)


def test_the_start_is_followed_from_outside(stack: list[dict]) -> None:
    states = [answer["state"] for answer in stack]
    assert states[0] == "progressing" and "ready" in states and not {"stalled", "failed"} & set(states), states
    phases = {rank["phase"] for answer in stack for rank in answer["ranks"]}
    assert len(phases) > 2, f"the page showed only {phases}"
    assert all(rank["in_sight"] for answer in stack for rank in answer["ranks"]), (
        "the ranks' processes are out of sight"
    )


@pytest.mark.parametrize(
    "arguments, status, says",
    [
        (["/models/nothing"], 2, "/models/nothing is not a directory"),
        (["/models/deepseek-v4-tiny", "-tp", "8", "--enable-expert-parallel"], 10, "expected 8.0 GiB"),
    ],
    ids=["no checkpoint", "too little shared memory"],
)
def test_the_container_ends_with_the_documented_code(
    engine: Engine, stack: list[dict], arguments: list[str], status: int, says: str
) -> None:
    result = engine.docker("run", "--rm", "--network=none", CPU_IMAGE, *arguments, check=False)
    assert (result.returncode, says in result.stdout) == (status, True), result.stdout


def test_a_chat_is_answered(engine: Engine, stack: list[dict]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    code, text = engine.fetch(f"{API}/v1/chat/completions", body, timeout=120)
    assert code == 200, text
    answer = json.loads(text)
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] > 0
    log = _compose(engine, "logs", "vllm-cpu")
    assert "NVFP4 experts run on nvfp4_megamoe: backend cpu" in log


def test_every_panel_and_alert_can_be_asked(engine: Engine, stack: list[dict]) -> None:
    """With what the running server really exports."""
    engine.fetch(f"{API}/v1/completions", {"model": MODEL, "prompt": "hello", "max_tokens": 4}, timeout=120)
    generated = "sum(vllm:generation_tokens_total) > 0"
    deadline = time.monotonic() + 60
    while not _query(engine, generated):
        assert time.monotonic() < deadline, "Prometheus has not seen the tokens after a minute"
        time.sleep(1)
    for expression in expressions(REPOSITORY):
        _query(engine, expression)
    assert all(float(row["value"][1]) == 1 for row in _query(engine, "up")) and len(_query(engine, "up")) == 2
    assert [row["metric"]["state"] for row in _query(engine, "mega_moe_startup_state == 1")] == ["ready"]
    rules = json.loads(engine.fetch(f"{PROMETHEUS}/api/v1/rules")[1])["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}


def test_a_dead_rank_is_named_and_the_server_restarted_without_compiling(engine: Engine, stack: list[dict]) -> None:
    name = _compose(engine, "ps", "--quiet", "vllm-cpu").strip()
    cache = ["python3", "scripts/cache_environment.py"]
    engine.docker("exec", name, *cache, "snapshot", "/tmp/before.json")
    (rank,) = json.loads(engine.fetch(f"{STATUS}/startup")[1])["ranks"]
    engine.docker("exec", name, "python3", "-c", f"import os; os.kill({rank['pid']}, 9)")
    dead = f"failed: rank 0 (pid {rank['pid']}"
    _wait(lambda: dead in engine.fetch(f"{STATUS}/startupz")[1], "the status service has not seen the death", 30)
    _wait(lambda: _inspect(engine, name)["RestartCount"] == 1, "the container was not restarted", 60)
    _wait(lambda: "RankFailed" in _firing(engine), "no alert of the dead rank", 60)
    assert "Ending with status 11" in _compose(engine, "logs", "vllm-cpu")
    _wait(lambda: engine.fetch(f"{API}/health")[0] == 200, "the server did not come back", 300)
    _wait(lambda: engine.fetch(f"{STATUS}/startupz")[0] == 200, "the status service has not seen the new start", 30)
    changes = engine.docker("exec", name, *cache, "changes", "/tmp/before.json", check=False)
    assert changes.returncode == 0, f"the second start compiled:\n{changes.stdout}"


def test_docker_stop_lets_a_request_finish_and_ends_with_0(engine: Engine, stack: list[dict]) -> None:
    name = _compose(engine, "ps", "--quiet", "vllm-cpu").strip()
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
    answer: list[tuple[int | None, str]] = []
    request = threading.Thread(target=lambda: answer.append(engine.fetch(f"{API}/v1/completions", body, timeout=60)))
    request.start()
    _wait(lambda: _value(engine.fetch(f"{API}/metrics")[1], "vllm:num_requests_running{") > 0, "no request runs", 30)
    _compose(engine, "stop", "vllm-cpu")
    request.join()
    code, text = answer[0]
    assert code == 200 and json.loads(text)["usage"]["completion_tokens"] == 100, answer
    state = _inspect(engine, name)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert "stopped" in engine.fetch(f"{STATUS}/startupz")[1]


def _compose(engine: Engine, *arguments: str, check: bool = True) -> str:
    profiles = ["compose", "--profile", "cpu", "--profile", "monitoring"]
    return engine.docker(*profiles, *arguments, check=check, cwd=REPOSITORY).stdout


def _in(engine: Engine, image: str, code: str, *options: str) -> str:
    return engine.docker("run", "--rm", *options, "--entrypoint", "python3", image, "-c", code).stdout


def _inspect(engine: Engine, name: str) -> dict:
    return json.loads(engine.docker("inspect", name).stdout)[0]


def _query(engine: Engine, expression: str) -> list[dict]:
    code, text = engine.fetch(f"{PROMETHEUS}/api/v1/query?query={urllib.parse.quote(expression)}")
    assert code == 200, f"{expression}: {text}"
    return json.loads(text)["data"]["result"]


def _firing(engine: Engine) -> set[str]:
    alerts = json.loads(engine.fetch(f"{PROMETHEUS}/api/v1/alerts")[1])["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def _value(metrics: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(name))


def _wait(condition: Callable[[], bool], otherwise: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.5)
