"""How servers under measurement are started, driven, compared and reported, with a stand-in for vLLM."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_expert_parallel  # noqa: E402
import bench_gpu_serving  # noqa: E402
import warm_up  # noqa: E402
from serving_bench import client, compare, expert_parallel_report, report, warm_plan, whole_model  # noqa: E402
from serving_bench.drive import drive  # noqa: E402
from serving_bench.plugin import random_weights  # noqa: E402
from serving_bench.server import Server, ServerError, free_port, start_phases  # noqa: E402


def fake(directory, *arguments):
    port = free_port()
    command = [sys.executable, str(ROOT / "tests" / "fake_openai_server.py"), str(port), *arguments]
    return Server("fake", command, {}, directory / "fake.log", f"http://127.0.0.1:{port}")


@pytest.fixture
def running(tmp_path):
    with fake(tmp_path) as server:
        server.start(30)
        yield server


def test_a_server_says_what_its_log_says(running):
    facts = running.facts()
    assert facts.pop("ready_s") > 0
    assert facts == {
        "moe_backend": "NVFP4_MEGAMOE", "own_kernels": "sm90 w4a16", "kv_cache_gib": 12.5, "kv_cache_tokens": 52046,
        "compiled_while_serving": ["TileLang JIT compilation during inference: mhc_pre"],
    }  # fmt: skip


def test_a_server_that_ends_is_named_with_its_error(tmp_path):
    with pytest.raises(ServerError, match=r"(?s)fake ended with status 1.*this checkpoint cannot be served"):
        fake(tmp_path, "--refuse").start(30)


def test_a_server_that_is_never_ready_is_ended(tmp_path):
    server = fake(tmp_path, "--silent")
    with pytest.raises(ServerError, match="was not ready after 1 s"):
        server.start(1)
    assert server.process.poll() is not None


def test_a_measurement_that_is_told_to_end_leaves_no_server(tmp_path):
    program = (
        "import sys, time; sys.path[:0] = [r'{}', r'{}']\n"
        "from pathlib import Path; import test_serving_bench as t; from serving_bench import server\n"
        "server.end_servers_with_this_process(); s = t.fake(Path(r'{}')); s.start(30)\n"
        "print(s.process.pid, flush=True); time.sleep(600)\n"
    ).format(ROOT / "tests", ROOT / "scripts", tmp_path)
    measurement = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(measurement.stdout.readline())
    measurement.send_signal(signal.SIGTERM)
    assert measurement.wait(30) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the server lives on"
        time.sleep(0.05)


def test_decode_counts_the_time_between_tokens(running):
    found = client.decode(running.base_url, 3, 20, 8)
    assert found["sequences"] == 3
    assert 8 < found["ms_per_token"] < 60
    assert found["output_tokens_s"] == pytest.approx(3e3 / found["ms_per_token"])


def test_prefill_counts_prompt_tokens(running):
    assert client.prefill(running.base_url, 500)["tokens_s"] > 500


def test_a_refused_request_is_an_error_with_its_reason(running):
    with pytest.raises(ServerError, match="the prompt is too long"):
        client.prompt_logprobs(running.base_url, client.prompt(2001))
    with pytest.raises(ServerError, match="the prompt is too long"):
        client.decode(running.base_url, 1, 2001, 2)


def test_prompts_are_ordinary_tokens_and_differ():
    prompts = [client.prompt(100, seed) for seed in range(200)]
    assert all(7 <= token < 497 for tokens in prompts for token in tokens)
    assert len({tuple(tokens) for tokens in prompts}) == len(prompts)


def test_equal_servers_agree_and_a_shifted_one_does_not(tmp_path, running):
    reference = compare.answers(running.base_url)
    assert compare.faults(compare.difference(compare.answers(running.base_url), reference)) == []
    (tmp_path / "shifted").mkdir()
    with fake(tmp_path / "shifted", "--shift", "0.1") as shifted:
        shifted.start(30)
        found = compare.difference(compare.answers(shifted.base_url), reference)
    assert found["mean"] == pytest.approx(0.1)
    assert found["greedy_equal_tokens"] == [0, 0, 0]
    wrong = compare.faults(found)
    assert "log-probabilities differ by 0.1000" in wrong[0]
    assert "parts where the reference prefers its token by more than the five likeliest allow" in wrong[1]


def test_near_ties_may_part_and_preferences_may_not():
    reference = client.Greedy(["a", "b"], [{"a": -1.0, "c": -1.1}, {"b": -0.1, "c": -3.0}])
    assert compare.parting(client.Greedy(["c", "b"], []), reference) == (0, pytest.approx(0.1))
    assert compare.parting(client.Greedy(["a", "c"], []), reference) == (1, pytest.approx(2.9))
    assert compare.parting(client.Greedy(["a", "b"], []), reference) == (2, 0.0)
    found = {"mean": float("nan"), "parting_gaps": [0.1, 2.9, None]}
    assert len(compare.faults(found)) == 3


@pytest.mark.parametrize(
    "batched,sequences,length", [(8192, 128, 9216), (1024, 4, 2048), (1, 1, 2), (8192, 256, 1048576)]
)
def test_the_plan_fits_the_server_and_reaches_every_block_and_batch(batched, sequences, length):
    groups = warm_plan.plan(batched, sequences, length)
    assert all(
        prompt >= 1 and output >= 1 and prompt + output <= length for group in groups for prompt, output in group
    )
    assert max(map(len, groups)) == max(sequences, 1)
    lone = [group[0][0] for group in groups if len(group) == 1]
    steps = {-(-tokens // 64) for tokens in lone}
    assert steps >= set(range(1, min(batched, length - 1, warm_plan.FINE_TOKENS) // 64 + 1))
    if length > 2 * batched:
        assert max(lone) == 2 * batched


def test_the_plan_refuses_what_cannot_be_served():
    with pytest.raises(ValueError, match="max_length 1"):
        warm_plan.plan(8192, 128, 1)


def test_warming_drives_every_group_and_reports_what_the_second_pass_compiled(tmp_path, running):
    root = tmp_path / "caches"
    found = warm_up.warm(running.base_url, warm_plan.plan(64, 3, 200), running.text, root)
    assert found["first_pass"]["requests"] == found["second_pass"]["requests"] > 10
    assert found["first_pass"]["compiled"] == ["TileLang JIT compilation during inference: mhc_pre"]
    assert found["second_pass"]["compiled"] == []
    assert "slowest group" in warm_up.show(found)


@pytest.mark.parametrize(
    ("start", "first", "second", "any_time", "says"),
    [
        ({}, {}, {}, True, None),
        ({"Triton": {}}, {}, {}, False, None),
        ({}, {"DeepGEMM": {}}, {}, False, None),
        ({"Triton": {}}, {}, {}, True, "this start compiled"),
        ({}, {"DeepGEMM": {}}, {}, True, "this start compiled"),
        ({}, {}, {"Triton": {}}, False, "the second pass compiled again"),
        ({}, {}, {"Triton": {}}, True, "the second pass compiled again"),
    ],
)
def test_what_a_start_may_compile(start, first, second, any_time, says):
    # The monitor's line of a first pass does not count: it also names kernels that come from a cache.
    passes = {"first_pass": {"files": first, "compiled": ["x"]}, "second_pass": {"files": second, "compiled": []}}
    complaint = warm_up.judge({"start_files": start, **passes}, any_time)
    assert says is None if complaint is None else says in complaint


def test_a_pass_ends_at_its_limit(tmp_path, running):
    groups = warm_plan.plan(64, 3, 200)
    found = warm_up.warm(running.base_url, groups, running.text, tmp_path, limit_s=0.05)
    assert 0 < found["first_pass"]["groups"] < len(groups) and found["second_pass"]["groups"] > 0
    assert f"of {len(groups)} groups" in warm_up.show(found)


def test_each_engine_gets_each_group(running):
    groups = [[(5, 1)], [(6, 2), (7, 2)]]
    assert drive(running.base_url, groups, 0, engines=4)["requests"] == 12


def test_warming_a_running_server_is_a_command(tmp_path, running):
    command = [sys.executable, str(ROOT / "scripts" / "warm_up.py"), "--url", running.base_url, "--root", str(tmp_path)]
    done = subprocess.run(
        [*command, "--max-num-batched-tokens", "64", "--max-num-seqs", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "second pass" in done.stdout
    running.stop()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "warm_up:" in done.stderr


def test_a_failed_stage_is_recorded_and_the_report_is_whole_after_each(tmp_path):
    made = report.Report(tmp_path / "r.json", lambda data: "\n".join(data["stages"]))
    made.stage("good", lambda: {"value": 1.5})
    assert json.loads((tmp_path / "r.json").read_text())["stages"]["good"]["result"] == {"value": 1.5}
    assert made.stage("bad", lambda: 1 / 0) is None
    made.skip("later", "no time")
    stages = json.loads((tmp_path / "r.json").read_text())["stages"]
    assert stages["bad"]["error"].startswith("ZeroDivisionError")
    assert stages["later"] == {"skipped": "no time"}
    assert made.failed()
    assert (tmp_path / "r.md").read_text() == "good\nbad\nlater\n"


def start(backend, files=None, compiled=()):
    itself = {"mean": 0.0, "max": 0.0, "parting_gaps": [], "greedy_equal_tokens": [48]}
    bench = {"decode-heavy": {"output_throughput": 100.0, "median_tpot_ms": 10.0, "run": 2, "compiled": {}}}
    return {"result": {"moe_backend": backend, "itself": itself, "files": files or {}, "phases": {"upload": 1.0},
                       "compiled_while_serving": list(compiled), "bench": bench}}  # fmt: skip


def serving_report(**changes):
    stages = {
        "own, first start": start("NVFP4_MEGAMOE"), "own, second start": start("NVFP4_MEGAMOE", compiled=["x"]),
        "stock, first start": start("HUMMING"),
        "own against stock": {"result": {"mean": 0.02, "max": 0.2, "parting_gaps": [0.1], "greedy_equal_tokens": [9]}},
    }  # fmt: skip
    return {"about": report.about(), "settings": ["decode-heavy"], "starts": 2, "stages": stages | changes}


def test_a_good_serving_report_has_no_fault():
    data = serving_report()
    assert bench_gpu_serving.judge(data, ["own", "stock"]) == []
    assert "| decode-heavy | output_throughput | 100.0 | 100.0 | 100.0 | 1 |" in bench_gpu_serving.render(data)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"own, first start": start("MARLIN")}, "the log names MARLIN"),
        ({"stock, first start": start("NVFP4_MEGAMOE")}, "the log names NVFP4_MEGAMOE"),
        ({"own, first start": {"error": "x"}}, "nothing was measured"),
        ({"own, second start": start("NVFP4_MEGAMOE", {"Triton": {"files": 1}})}, "the second start compiled"),
        ({"own, second start": {"error": "x"}}, "no second start"),
        ({"own against stock": {"result": {"mean": 0.3, "parting_gaps": []}}}, "differ by 0.3"),
        ({"own against stock": {}}, "not compared"),
    ],
)
def test_faults_of_a_serving_report_are_named(changes, fault):
    data = serving_report(**changes)
    assert any(fault in wrong for wrong in bench_gpu_serving.judge(data, ["own", "stock"]))
    bench_gpu_serving.render(data)


def test_a_measurement_that_compiled_and_a_start_that_was_not_asked_for():
    compiling = start("HUMMING")
    compiling["result"]["bench"]["decode-heavy"] |= {"run": 6, "compiled": {"DeepGEMM": {"files": 2}}}
    data = serving_report(**{"stock, first start": compiling, "own, second start": {}}) | {"starts": 1}
    assert bench_gpu_serving.judge(data, ["own", "stock"]) == [
        "stock, decode-heavy: also run 6 compiled, see its files"
    ]


def test_vllm_bench_runs_until_nothing_is_compiled(tmp_path, monkeypatch):
    a = argparse.Namespace(
        settings={"decode-heavy": (8, 8, 8, 8), "prefill-heavy": (64, 1, 8, 8)}, logs=tmp_path, model=tmp_path,
        bench_flags="", caches=tmp_path / "caches",
    )  # fmt: skip
    side = bench_gpu_serving.Side("own", None, None, a, report.Report(tmp_path / "r.json", lambda data: ""))
    compiling = {"decode-heavy": [True, True, False], "prefill-heavy": [True] * 9}
    runs = []

    def vllm_bench(running, model, setting, out, flags):
        name = out.name.removeprefix("own-first-").rpartition("-")[0]
        runs.append(name)
        if compiling[name].pop(0):
            kernel = side.root / "deep_gemm" / f"{len(runs)}.cubin"
            kernel.parent.mkdir(parents=True, exist_ok=True)
            kernel.write_bytes(b"kernel")
        return {"output_throughput": float(len(runs))}

    monkeypatch.setattr(bench_gpu_serving, "vllm_bench", vllm_bench)
    found = {}
    side.bench(argparse.Namespace(label="own-first"), found)
    most = bench_gpu_serving.MOST_RUNS
    assert runs == ["decode-heavy"] * 3 + ["prefill-heavy"] * most
    assert found["bench"]["decode-heavy"] == {"output_throughput": 3.0, "run": 3, "compiled": {}}
    assert found["bench"]["prefill-heavy"]["run"] == most
    assert found["bench"]["prefill-heavy"]["compiled"]["DeepGEMM"]["files"] == 1


def test_the_expert_parallel_report_shows_what_a_cut_off_stage_had():
    decode = [{"sequences": 1, "ms_per_token": 5.0}, {"sequences": 8, "ms_per_token": 8.0}]
    own = {"decode": decode, "prefill": {"tokens_s": 9000.0}, "moe_backend": "NVFP4_MEGAMOE", "phases": {"upload": 2.0}}
    stock = {"decode": [{"sequences": 1, "ms_per_token": 10.0}], "prefill": {"tokens_s": 3000.0}}
    data = {"about": report.about(), "stages": {
        "own, whole model": {"result": own, "seconds": 1.0}, "stock, whole model": {"partial": stock, "error": "cut"},
        "all GPUs, few layers": {"result": {"moe_backend": "HUMMING", "itself": {"mean": 0.0, "parting_gaps": []}}},
        "all GPUs against one": {"result": {"mean": 0.5, "parting_gaps": []}},
    }}  # fmt: skip
    text = expert_parallel_report.render(data)
    assert "| ms per output token, 1 sequences | 5 | 10 | 2 |" in text
    assert "| ms per output token, 8 sequences | 8 |  |  |" in text
    assert "| prompt tokens/s of a lone prefill | 9000.0 | 3000.0 | 3 |" in text
    wrong = expert_parallel_report.judge(data)
    assert any("differ by 0.5" in fault for fault in wrong)
    assert any("expected NVFP4_MEGAMOE" in fault for fault in wrong)


def expert_parallel_stages(**changes):
    alike = {"result": {"mean": 0.02, "correlation": 0.99, "parting_gaps": []}}
    own, stock = ({"result": {"moe_backend": backend}} for backend in ("NVFP4_MEGAMOE", "HUMMING"))
    stages = {
        "one GPU, few layers": own, "all GPUs, few layers": own, "all GPUs against one": alike,
        "stock, all GPUs, few layers": stock, expert_parallel_report.FEW: alike,
        "own, whole model": own, "stock, whole model": stock,
        expert_parallel_report.WHOLE: {"result": {"mean": 1.0, "correlation": 0.7, "parting_gaps": [None]}},
    }  # fmt: skip
    return {"about": report.about(), "stages": stages | changes}


def test_a_good_expert_parallel_report_has_no_fault():
    assert expert_parallel_report.judge(expert_parallel_stages()) == []


def test_stages_are_compared_where_both_sides_have_answered(tmp_path):
    class Instant(bench_expert_parallel.Bench):
        def few_layers(self, side, gpus):
            said = {"logprobs": [[-1.0, -2.0 - 0.01 * len(gpus)]], "greedy": []}
            self._answers_file(side, f"few-{len(gpus)}").write_text(json.dumps(said))
            return {}

    options = argparse.Namespace(minutes=5, logs=tmp_path)
    made = report.Report(tmp_path / "report.json", lambda data: "")
    Instant(options).run(["few-all"], [0, 1], made)
    assert "own-few-1-answers.json does not exist" in made.data["stages"][expert_parallel_report.ONE]["skipped"]
    Instant(options).run(["few-one", "few-all"], [0, 1], made)
    assert not made.failed()
    assert report.result(made.data, expert_parallel_report.ONE)["mean"] == pytest.approx(0.005)
    assert expert_parallel_report.FEW not in made.data["stages"]

    options.minutes = 0
    Instant(options).run(["few-stock"], [0, 1], made)
    assert "of the budget were left" in made.data["stages"]["stock, all GPUs, few layers"]["skipped"]
    assert "does not exist" in made.data["stages"][expert_parallel_report.FEW]["skipped"]


@pytest.mark.parametrize(
    ("stage", "result", "fault"),
    [
        ("stock, all GPUs, few layers", {"moe_backend": "NVFP4_MEGAMOE"}, "--stock-site is patched"),
        ("stock, whole model", {"moe_backend": "NVFP4_MEGAMOE"}, "--stock-site is patched"),
        ("own, whole model", {"moe_backend": "HUMMING"}, "expected NVFP4_MEGAMOE"),
        (expert_parallel_report.FEW, {"mean": 0.3, "correlation": 0.9, "parting_gaps": []}, "differ by 0.3"),
        (expert_parallel_report.WHOLE, {"mean": 1.0, "correlation": 0.2}, "correlate by 0.20"),
        (expert_parallel_report.WHOLE, {"mean": 1.0, "correlation": None}, "correlate by 0.00"),
        (expert_parallel_report.WHOLE, {"mean": 1.0, "correlation": float("nan")}, "correlate by nan"),
    ],
)
def test_faults_of_an_expert_parallel_report_are_named(stage, result, fault):
    wrong = expert_parallel_report.judge(expert_parallel_stages(**{stage: {"result": result}}))
    assert len(wrong) == 1 and fault in wrong[0]


def test_four_gpus_hold_what_each_of_eight_would():
    for ranks in (4, 8):
        geometry = whole_model.pro(bench_expert_parallel.EXPERTS[ranks])
        assert geometry.layers == 61
        assert whole_model.expert_bytes(geometry, ranks) / 61 / 2**30 == pytest.approx(1.66, abs=0.01)


def test_a_small_shared_memory_is_named(monkeypatch):
    monkeypatch.setattr(bench_expert_parallel.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 64 << 20}))
    assert "/dev/shm has 0.1 GiB free, 4 ranks need 4" in bench_expert_parallel.shared_memory_fault(4)
    assert bench_expert_parallel.shared_memory_fault(1) is None


@pytest.mark.parametrize("tool", [bench_gpu_serving, bench_expert_parallel])
def test_stock_needs_a_folder(tool, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["tool", "--json", "x.json", "--model", "m"][: 5 if tool is bench_gpu_serving else 3]
    )
    with pytest.raises(SystemExit):
        tool.main()
    assert "--stock-site" in capsys.readouterr().err


def test_the_flags_of_both_benchmarks_are_flags_of_vllm():
    import shlex

    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for flags in (bench_gpu_serving.FLAGS, bench_expert_parallel.FLAGS):
        parsed = parser.parse_args([*shlex.split(flags), "--moe-backend", "nvfp4_megamoe", "--enable-expert-parallel"])
        assert parsed.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"


def test_phases_are_the_slowest_ranks(tmp_path):
    for rank, seconds in enumerate((1.0, 3.0)):
        phases = [{"name": "upload", "seconds": seconds}, {"name": "ready", "seconds": 9.0}]
        (tmp_path / f"run-rank{rank}.json").write_text(json.dumps({"phases": phases}))
    assert start_phases(tmp_path) == {"upload": 3.0}


def test_random_weights_keep_sizes_and_are_equal_in_every_process():
    def filled(name, shape, dtype):
        tensor = torch.full(shape, 7, dtype=torch.float32).to(dtype)
        random_weights.fill(name, tensor)
        return tensor

    weight = filled("model.layers.1.attn.wq_b.weight", (512, 256), torch.float8_e4m3fn)
    scale = filled("model.layers.1.attn.wq_b.weight_scale_inv", (4, 2), torch.float32)
    assert (scale == scale[0, 0]).all()
    output = torch.randn(64, 256) @ (weight.float() * scale[0, 0]).T
    assert output.std() == pytest.approx(1.0, rel=0.5)
    assert torch.equal(
        weight.view(torch.uint8),
        filled("model.layers.1.attn.wq_b.weight", (512, 256), torch.float8_e4m3fn).view(torch.uint8),
    )
    assert (filled("model.layers.0.attn_norm.weight", (16,), torch.bfloat16) == 1).all()
    codes = filled("m.experts.w13_weight", (2, 64, 32), torch.uint8)
    assert codes.unique().numel() > 100
    table = torch.zeros(100, 6, dtype=torch.int32)
    random_weights.fill_hash_table("m.gate.tid2eid", table, 96)
    assert all(len(set(row.tolist())) == 6 for row in table)
    assert table.max() > 80


def test_the_plugin_is_found_by_its_folder():
    program = "import importlib.metadata as m; print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    environment = {**os.environ, "PYTHONPATH": str(whole_model.PLUGIN)}
    printed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout
    assert "random_weights:install" in printed


def test_what_a_failed_stage_had_is_kept(tmp_path):
    made = report.Report(tmp_path / "r.json", lambda data: "")

    def fails():
        made.partial("stage")["ready_s"] = 3.0
        raise ServerError("gone")

    made.stage("stage", fails)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert report.result(stored, "stage", "ready_s") == 3.0
    assert stored["stages"]["stage"]["error"] == "ServerError: gone"
    made.stage("whole", lambda: made.partial("whole") | {"a": 1})
    assert "partial" not in json.loads((tmp_path / "r.json").read_text())["stages"]["whole"]


def side_of(tmp_path, monkeypatch, server):
    arguments = type("Arguments", (), {})()
    arguments.caches, arguments.logs, arguments.model = tmp_path / "caches", tmp_path, tmp_path / "model"
    arguments.timeout, arguments.warm_seconds, arguments.bench_flags = 30, 60, ""
    arguments.batched_tokens, arguments.sequences, arguments.length = 64, 2, 2048
    arguments.settings = {"decode-heavy": (16, 4, 4, 2)}
    made = report.Report(tmp_path / "r.json", bench_gpu_serving.render)
    made.data |= {"settings": ["decode-heavy"], "starts": 2}
    side = bench_gpu_serving.Side("own", None, None, arguments, made)
    monkeypatch.setattr(bench_gpu_serving.Side, "server", lambda *_: server)
    server.environment["MEGA_MOE_STATUS_DIR"] = str(tmp_path)
    return side, made


def test_both_starts_of_a_side_and_a_benchmark_that_fails(tmp_path, monkeypatch):
    bench = {"output_throughput": 9.0}
    monkeypatch.setattr(bench_gpu_serving, "vllm_bench", lambda *_: bench)
    side, made = side_of(tmp_path, monkeypatch, fake(tmp_path))
    made.stage("own, first start", side.first_start)
    made.stage("own, second start", side.second_start)
    assert not made.failed(), made.data
    measured = report.result(made.data, "own, second start", "bench", "decode-heavy")
    assert measured == bench | {"run": 2, "compiled": {}}
    assert report.result(made.data, "own, second start", "files") == {}
    # The stand-in logs a kernel's first use in every start.
    assert report.result(made.data, "own, second start", "compiled_while_serving")
    assert bench_gpu_serving.judge(made.data, ["own"]) == []

    def broken(*_):
        raise ServerError("vllm bench serve ended with status 1")

    monkeypatch.setattr(bench_gpu_serving, "vllm_bench", broken)
    made.stage("own, first start", side.first_start)
    assert report.result(made.data, "own, first start", "itself", "mean") == 0.0
    assert "| own against itself | 0 |" in (tmp_path / "r.md").read_text()


def test_the_whole_model_is_measured_step_by_step(tmp_path, monkeypatch):
    arguments = type("Arguments", (), {"minutes": 5, "layers": 2, "caches": tmp_path, "logs": tmp_path})()
    monkeypatch.setattr(bench_expert_parallel.Bench, "server", lambda *_, **__: server)
    monkeypatch.setattr(bench_expert_parallel, "SEQUENCES", (1, 3))
    monkeypatch.setattr(bench_expert_parallel, "PREFILL_TOKENS", 1000)
    server = fake(tmp_path)
    server.environment["MEGA_MOE_STATUS_DIR"] = str(tmp_path)
    made = report.Report(tmp_path / "r.json", expert_parallel_report.render)
    bench_expert_parallel.Bench(arguments).run(["whole-own"], [0], made)
    found = report.result(made.data, "own, whole model")
    assert not made.failed(), made.data
    assert [d["sequences"] for d in found["decode"]] == [1, 3]
    assert found["layers"] == 2
    assert "ms per output token, 3 sequences" in (tmp_path / "r.md").read_text()
    arguments.few_model = tmp_path / "few"
    bench_expert_parallel.Bench(arguments).run(["few-all", "few-stock", "whole-stock"], [0], made)
    for comparison in (expert_parallel_report.FEW, expert_parallel_report.WHOLE):
        assert report.result(made.data, comparison, "mean") == 0.0
        assert report.result(made.data, comparison, "tokens_compared") > 0
    arguments.minutes = 0
    bench_expert_parallel.Bench(arguments).run(["whole-own", "few-one"], [0], made)
    assert "of the budget were left" in made.data["stages"]["one GPU, few layers"]["skipped"]
    assert report.result(made.data, "own, whole model") == found
