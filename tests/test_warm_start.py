"""The entrypoint's warm-up requests hold /health back, and it counts what compilers write; a stand-in serves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.startup_cases import SCRIPTS, Ranks, Service, collector, look_until, service, state_is

# isort: split
from launch import flags, warming
from launch.start_watch import UNANSWERED
from serving_bench.server import free_port
from status import server_files

FAKE = Path(__file__).with_name("fake_openai_server.py")
PATIENCE_S = 60.0


class Started:
    """The entrypoint with the stand-in as its server, and the status service beside one simulated rank."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path, status: Service) -> None:
        self.process, self.url, self._log, self.status = process, url, log, status
        self.at_first_health = ""

    def log(self) -> str:
        return self._log.read_text()

    def health(self) -> int | None:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                self.at_first_health = self.at_first_health or self.log()
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def startup(self) -> dict[str, Any]:
        return json.loads(self.status.get("/startup")[1])

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> list[tuple[int | None, dict[str, Any]]]:
        """Ask health and /startup, in this order, until ``wanted`` holds; return all answers."""
        end, answers = time.monotonic() + PATIENCE_S, [(self.health(), self.startup())]
        while not wanted(answers[-1][1]):
            assert time.monotonic() < end, (answers[-1], self.log())
            time.sleep(0.05)
            answers.append((self.health(), self.startup()))
        return answers

    def ready(self) -> list[tuple[int | None, dict[str, Any]]]:
        return self.until(lambda answer: answer["state"] == "ready")

    def status_line(self, text: str) -> str:
        """The status service's first line with ``text``; it writes one a second."""
        self.until(lambda _: text in self.status.log())
        return next(line for line in self.status.log().splitlines() if text in line)


@contextmanager
def started(
    directory: Path, *options: str, arguments: tuple[str, ...] = (), look: float = 60.0, **settings: str
) -> Iterator[Started]:
    """``options`` of the stand-in, ``arguments`` of the entrypoint, ``look``: seconds between later looks at caches."""
    port, status, log = free_port(), directory / "status", directory / "log"
    status.mkdir(exist_ok=True)
    server = [sys.executable, str(FAKE), str(port), *options]
    command = [
        str(directory),
        "--port",
        str(port),
        "--max-num-seqs",
        "3",
        "--max-num-batched-tokens",
        "128",
        *arguments,
    ]
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import entrypoint\n"
        "from launch import start_watch as watch\n"
        f"watch.LOOK_EVERY_S, watch.ASK_EVERY_S, watch._END_SHOWS_S = {look}, 0.1, 3.0\n"
        f"entrypoint._cpu_build = lambda: False\n"
        f"entrypoint.serve.command = lambda arguments: {server!r}\n"
        f"sys.exit(entrypoint.main({command!r}))"
    )
    variables = {"MEGA_MOE_PREFLIGHT": "off", "MEGA_MOE_STATUS_DIR": str(status)}
    variables |= {"MEGA_MOE_CACHE_DIR": str(directory / "cache"), **settings}
    url = f"http://127.0.0.1:{port}"
    watch = service(status, directory / "status.log", "--health-url", f"{url}/health", "--log-every", "1")
    with Ranks(status) as ranks, watch as watcher, open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | variables, stdout=stream, stderr=stream, text=True
        )
        try:
            while not (status / f"server-{port}.json").exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            ranks.start(0, 1, "ready")
            yield Started(process, url, log, watcher)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)


def files(answer: dict[str, Any], stage: str) -> dict[str, int]:
    (server,) = answer["servers"]
    return {name: total["files"] for name, total in server["compiled"].get(stage, {}).items()}


def test_ready_is_said_after_the_warm_up_and_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    with started(tmp_path, "--compile", "--slow", "0.1") as first:
        answers = first.ready()
        held = [answer for health, answer in answers if health == 503]
        assert held and all(answer["state"] == "progressing" and answer["code"] == 503 for answer in held)
        assert "compiled by them: DeepGEMM 5 files" in first.at_first_health, "healthy before the warm-up was over"
        sent = [answer["servers"][0]["warm_up"]["sent"] for answer in held]
        assert sent == sorted(sent) and len(set(sent)) >= 3, "the page shows how far it is"
        assert any(
            "warm-up requests: " in answer["reason"] and "all 1 ranks are ready" in answer["reason"] for answer in held
        )
        last = answers[-1][1]
        warm_up = last["servers"][0]["warm_up"]
        assert warm_up["sent"] == warm_up["of"] > 10 and warm_up["error"] is None and not warm_up["cut_off"]
        assert files(last, "start") == {"Triton": 1}
        assert files(last, "warm_up") == {"DeepGEMM": 5}, "prompts of up to 256 tokens, 64 a kernel"
        assert {"name": "warm-up requests", "seconds": warm_up["seconds"]} in last["phases"]
        line = first.status_line("compiled this start")
        assert "before ready Triton 1 files; by the warm-up DeepGEMM 5 files" in line
        families = {family.name: family for family in text_string_to_metric_families(first.status.get("/metrics")[1])}
        counted = {
            (sample.labels["stage"], sample.labels["compiler"]): sample.value
            for sample in families["mega_moe_startup_compiled_files"].samples
        }
        assert counted == {
            ("start", "Triton"): 1,
            ("start", "all"): 1,
            ("warm_up", "DeepGEMM"): 5,
            ("warm_up", "all"): 5,
            ("serving", "all"): 0,
        }
        assert families["mega_moe_startup_warm_up_groups"].samples[0].value == warm_up["of"]
    with started(tmp_path, "--compile") as second:
        last = second.ready()[-1][1]
        assert last["servers"][0]["compiled"]["start"] == last["servers"][0]["compiled"]["warm_up"] == {}
        assert "compiled this start: nothing" in second.status_line("compiled this start")
        assert "compiled by them: nothing" in second.log()


def test_what_users_make_it_compile_is_told(tmp_path: Path) -> None:
    with started(tmp_path, "--compile", look=0.3) as server:
        server.ready()
        body = json.dumps({"prompt": [7] * 1000, "max_tokens": 1}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", body), timeout=10).read()
        answer = server.until(lambda answer: bool(files(answer, "serving")))[-1][1]
        assert files(answer, "serving") == {"DeepGEMM": 1} and answer["state"] == "ready"
        assert "compiled after ready: DeepGEMM 1 files" in server.log()
        server.status_line("since ready DeepGEMM 1 files")


@pytest.mark.parametrize("mode", ["strict", "report"])
def test_a_request_that_fails_ends_the_server_or_is_told(tmp_path: Path, mode: str) -> None:
    with started(tmp_path, "--break", "5", MEGA_MOE_WARM_UP=mode) as server:
        if mode == "strict":
            assert server.process.wait(PATIENCE_S) == UNANSWERED
            assert "the warm-up requests failed" in server.log() and "answered 500" in server.log()
            answer = server.until(lambda answer: answer["state"] == "failed")[-1][1]
            assert answer["code"] == 500 and "EngineCore encountered an issue" in answer["reason"]
        else:
            answer = server.ready()[-1][1]
            assert server.health() == 200
            assert "EngineCore encountered an issue" in answer["servers"][0]["warm_up"]["error"]
            assert any("the warm-up requests failed" in problem for problem in answer["problems"])
            assert "mega_moe_startup_warm_up_failed{" in server.status.get("/metrics")[1]


def test_a_server_that_dies_in_its_warm_up_ends_as_it_ended(tmp_path: Path) -> None:
    with started(tmp_path, "--die", "5") as server:
        assert server.process.wait(PATIENCE_S) == 3
        assert "the warm-up requests failed" not in server.log(), "the server's own end says more"


def test_an_order_during_the_warm_up_ends_with_0(tmp_path: Path) -> None:
    with started(tmp_path, "--slow", "1") as server:
        server.until(lambda answer: "groups in" in answer["reason"])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        assert not list((tmp_path / "status").glob("*.hold"))


def test_a_warm_up_is_cut_off_at_its_limit_and_the_server_is_ready(tmp_path: Path) -> None:
    with started(tmp_path, "--slow", "0.3", MEGA_MOE_WARM_UP_SECONDS="1") as server:
        answer = server.ready()[-1][1]
        warm_up = answer["servers"][0]["warm_up"]
        assert warm_up["cut_off"] and 0 < warm_up["sent"] < warm_up["of"]
        assert "cut off by MEGA_MOE_WARM_UP_SECONDS=1" in server.log()


@pytest.mark.parametrize("settings, arguments", [({"VLLM_API_KEY": "secret"}, ()), ({}, ("--api-key", "secret"))])
def test_the_servers_key_is_sent(tmp_path: Path, settings: dict[str, str], arguments: tuple[str, ...]) -> None:
    with started(tmp_path, "--key", "secret", arguments=arguments, **settings) as server:
        assert server.ready()[-1][1]["servers"][0]["warm_up"]["error"] is None


def test_without_a_status_directory_health_is_held_all_the_same(tmp_path: Path) -> None:
    port = free_port()
    server = [sys.executable, str(FAKE), str(port), "--slow", "0.1"]
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import entrypoint\n"
        f"entrypoint._cpu_build = lambda: False; entrypoint.serve.command = lambda arguments: {server!r}\n"
        f"sys.exit(entrypoint.main([{str(tmp_path)!r}, '--port', '{port}', '--max-num-seqs', '3',\n"
        f"    '--max-num-batched-tokens', '128']))"
    )
    variables = {"MEGA_MOE_PREFLIGHT": "off", "MEGA_MOE_STATUS_DIR": "0", "MEGA_MOE_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | variables, stderr=subprocess.DEVNULL)
    try:
        seen, end = [], time.monotonic() + PATIENCE_S
        while 200 not in seen:
            assert time.monotonic() < end, seen
            seen.append(Started(process, f"http://127.0.0.1:{port}", Path(os.devnull), None).health())
            time.sleep(0.05)
        assert 503 in seen
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_a_dead_entrypoints_word_is_not_believed(tmp_path: Path) -> None:
    with started(tmp_path, "--slow", "5") as server:
        server.until(lambda answer: "warm-up requests" in answer["reason"])
        pid = server.process.pid
        orphans = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        server.process.kill()
        server.process.wait()
        try:
            server.until(lambda answer: not answer["servers"])
        finally:
            for orphan in orphans:
                os.kill(int(orphan), signal.SIGKILL)


def test_a_frozen_entrypoint_is_a_stall(tmp_path: Path) -> None:
    with started(tmp_path, "--slow", "5") as server:
        server.until(lambda answer: "groups in" in answer["reason"])
        watch = collector(tmp_path / "status", stall_after=7.0)
        assert watch.look().verdict.state == "progressing"
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert "the entrypoint has not reported for" in look_until(watch, state_is("stalled")).verdict.reason
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert look_until(watch, state_is("progressing")).verdict.code == 503


@pytest.mark.parametrize(
    "text, says",
    [("{", "Expecting"), ('{"format": 2}', "format 2"), ('{"format": 1}', "incomplete: KeyError: 'warm_up'")],
)
def test_a_broken_file_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        server_files.parse(text)


@pytest.mark.parametrize(
    "settings, arguments, cpu_build, send, strict",
    [
        ({}, "", False, True, True),
        ({}, "", True, False, False),
        ({"MEGA_MOE_WARM_UP": "strict"}, "", True, True, True),
        ({"MEGA_MOE_WARM_UP": "report"}, "", False, True, False),
        ({"MEGA_MOE_WARM_UP": "off"}, "", False, False, False),
        ({}, "--headless", False, False, False),
        ({}, "--uds /run/api.sock", False, False, False),
        ({}, "--ssl-keyfile a --ssl-certfile b", False, False, False),
    ],
)
def test_where_warm_up_requests_are_sent(
    tmp_path: Path, settings: dict[str, str], arguments: str, cpu_build: bool, send: bool, strict: bool
) -> None:
    api = flags.read([str(tmp_path), *arguments.split()]).api
    setting = warming.read(settings, api, cpu_build)
    assert (setting.send, setting.strict) == (send, strict)
    assert (setting.why_not is None) == send


@pytest.mark.parametrize(
    "settings, arguments, says",
    [
        ({"MEGA_MOE_WARM_UP": "yes"}, "", "MEGA_MOE_WARM_UP is 'yes'"),
        ({"MEGA_MOE_WARM_UP_SECONDS": "0"}, "", "MEGA_MOE_WARM_UP_SECONDS is '0'"),
        ({"MEGA_MOE_WARM_UP_SECONDS": "long"}, "", "MEGA_MOE_WARM_UP_SECONDS is 'long'"),
        ({"MEGA_MOE_WARM_UP": "strict"}, "--uds /run/api.sock", "--uds"),
    ],
)
def test_unusable_settings_are_named(tmp_path: Path, settings: dict[str, str], arguments: str, says: str) -> None:
    with pytest.raises(flags.FlagError, match=says):
        warming.read(settings, flags.read([str(tmp_path), *arguments.split()]).api, False)


@pytest.mark.parametrize(
    "arguments, base_url, engines, sequences, tokens",
    [
        ("", "http://127.0.0.1:8000", 1, 1024, 16384),
        ("--host 0.0.0.0 --port 90 --max-num-seqs 32 --max-num-batched-tokens 8K", "http://127.0.0.1:90", 1, 32, 8192),
        ("--host ::1 -dp 8", "http://[::1]:8000", 8, 1024, 16384),
        ("--host 10.0.0.5 -dp 16 --data-parallel-rank 3", "http://10.0.0.5:8000", 1, 1024, 16384),
    ],
)  # fmt: skip
def test_address_and_bounds_come_from_the_flags(
    tmp_path: Path, arguments: str, base_url: str, engines: int, sequences: int, tokens: int
) -> None:
    api = flags.read([str(tmp_path), *arguments.split()]).api
    assert (api.base_url, api.engines, api.sequences, api.batched_tokens) == (base_url, engines, sequences, tokens)


def test_vllms_own_health_is_held_back_while_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.serve.instrumentator.health import health

    async def fine() -> None:
        pass

    client = SimpleNamespace(check_health=fine)
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine_client=client)))
    hold = tmp_path / "hold"
    hold.touch()
    assert asyncio.run(health(request)).status_code == 200
    monkeypatch.setenv("MEGA_MOE_HEALTH_HOLD", str(hold))
    answer = asyncio.run(health(request))
    assert answer.status_code == 503 and b"warm-up requests" in answer.body
    hold.unlink()
    assert asyncio.run(health(request)).status_code == 200
