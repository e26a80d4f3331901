"""The result of ``bench_expert_parallel.py``: its table, and what is wrong with it."""

from __future__ import annotations

from serving_bench import compare, report

OWN, STOCK = "own", "stock"
# The stages that compare what others have answered.
COMPARISONS = ONE, FEW, WHOLE = (
    "all GPUs against one",
    "own against stock, few layers",
    "own against stock, whole model",
)


def render(data: dict) -> str:
    """The report for people."""
    about = data["about"]
    lines = [
        f"{about['date']}, {'; '.join(about['devices']) or 'no GPU'}, {about['versions']}",
        f"`{about['command']}`",
        "",
    ]
    sides = {side: whole(data, side) for side in (OWN, STOCK)}

    def row(label: str, *values: object) -> list[object]:
        own, stock = values
        gain = stock / own if isinstance(own, float) and isinstance(stock, float) and own else None
        return [label, own, stock, gain]

    times = {side: {d["sequences"]: d for d in found.get("decode", [])} for side, found in sides.items()}
    rows = [
        row(f"ms per output token, {n} sequences", *(times[s].get(n, {}).get("ms_per_token") for s in sides))
        for n in sorted({*times[OWN], *times[STOCK]})
    ]
    rows.append(
        row("prompt tokens/s of a lone prefill", *(f.get("prefill", {}).get("tokens_s") for f in sides.values()))
    )
    if isinstance(rows[-1][3], float):
        rows[-1][3] = 1 / rows[-1][3]  # a rate: more is better
    for key in (
        "moe_backend",
        "own_kernels",
        "ready_s",
        "kv_cache_gib",
        "kv_cache_tokens",
        "layers",
        "experts",
        "ranks",
    ):
        rows.append([key, *(found.get(key) for found in sides.values()), None])
    rows += [[f"{phase}, s", sides[OWN]["phases"][phase], None, None] for phase in sides[OWN].get("phases", {})]
    lines += [report.table(["", OWN, STOCK, "times better"], rows), ""]
    rows = []
    for name, stage in data["stages"].items():
        found = stage.get("result") or {}
        judged = (
            found.get("itself") or found.get("answers_differ_from_themselves") or (found if "mean" in found else {})
        )
        state = stage.get("error") or stage.get("skipped") or "done"
        rows.append(
            [
                name,
                state,
                stage.get("seconds"),
                judged.get("mean"),
                judged.get("correlation"),
                judged.get("greedy_equal_tokens"),
                judged.get("parting_gaps"),
            ]
        )
    header = ["stage", "state", "s", "log-probabilities: mean difference", "correlation"]
    header += ["equal greedy tokens", "parting gaps"]
    lines += [report.table(header, rows), "", *(f"- WRONG: {fault}" for fault in data.get("wrong", []))]
    return "\n".join(lines)


def whole(data: dict, side: str) -> dict:
    stage = data["stages"].get(f"{side}, whole model", {})
    return stage.get("result") or stage.get("partial") or {}


def judge(data: dict) -> list[str]:
    """What is wrong with the stages that ran; empty where nothing is."""
    wrong = []
    for name in (ONE, FEW):
        if (found := report.result(data, name)) is not None:
            wrong += [f"{name}: {fault}" for fault in compare.faults(found)]
    if (found := report.result(data, WHOLE)) is not None:
        correlation = found.get("correlation") or 0.0  # a resumed report may be from before there was one
        if not correlation >= compare.LEAST_CORRELATION:  # a NaN is wrong too
            wrong.append(
                f"{WHOLE}: log-probabilities correlate by {correlation:.2f}, expected {compare.LEAST_CORRELATION}"
            )
    for name, stage in data["stages"].items():
        if "result" not in stage or name in COMPARISONS:
            continue
        backend = stage["result"].get("moe_backend", "")
        if name.startswith(STOCK):
            if backend == "NVFP4_MEGAMOE":
                wrong.append(f"{name}: stock vLLM used this project's backend; --stock-site is patched")
        elif backend != "NVFP4_MEGAMOE":
            wrong.append(f"{name}: the log names the backend {backend}, expected NVFP4_MEGAMOE")
    return wrong
