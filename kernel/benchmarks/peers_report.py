"""The result of ``moe_peers.py`` as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peers import PEERS

BFLOAT16 = ("own exact", "own w4a16")


def cells(rows: Sequence[dict]) -> dict[tuple[bool, int], dict[str, dict]]:
    """Rows by (skewed, tokens) and contender."""
    found: dict[tuple[bool, int], dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["skewed"], row["tokens"]), {})[row["contender"]] = row
    return found


def table(result: dict) -> str:
    """Markdown of a result: microseconds of each contender, and what our best one reaches of the ceilings."""
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    own = [name for name in names if name not in PEERS]
    peers = [name for name in names if name in PEERS]
    top = result["ceilings"]
    header = ["tokens", "routing", *(f"{name} us" for name in names)]
    header += ["best own: TB/s", "of copy", "TFLOP/s", "of ceiling"] if own else []
    header += ["against the better peer"] if own and peers else []
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for (skewed, tokens), row in cells(result["rows"]).items():
        line = [str(tokens), "skewed" if skewed else "uniform"]
        line += [f"{row[name]['us']:.1f}" if name in row else "" for name in names]
        if own:
            best = min((row[name] for name in own), key=lambda r: r["us"])
            ceiling = top["bf16_tflop_s" if best["contender"] in BFLOAT16 else "fp8_tflop_s"]
            line += [f"{best['tb_s']:.2f}", f"{best['tb_s'] / top['copy_tb_s']:.2f}"]
            line += [f"{best['tflop_s']:.0f}", f"{best['tflop_s'] / ceiling:.2f}"]
            if peers:
                line.append(f"{min(row[name]['us'] for name in peers) / best['us']:.2f}x")
        lines.append("| " + " | ".join(line) + " |")
    lines += [
        "",
        "| weight preparation | s | first, with what it compiles | GiB above steady state |",
        "|" + " --- |" * 4,
    ]
    for name, p in result["preparation"].items():
        lines.append(f"| {name} | {p['seconds']:.3f} | {p['first_seconds']:.3f} | {p['extra_gib']:.3f} |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Time over tokens for both routings, with the floors of memory and arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    for axis, skewed in zip(axes, (False, True), strict=True):
        rows = [row for row in result["rows"] if row["skewed"] is skewed]
        for name in names:
            mine = [row for row in rows if row["contender"] == name]
            style = "o--" if name in PEERS else "o-"
            axis.plot([r["tokens"] for r in mine], [r["us"] for r in mine], style, label=name, markersize=3)
        first = [row for row in rows if row["contender"] == names[0]]
        for label, kind, color in (("bf16", "bf16_tflop_s", "0.4"), ("fp8", "fp8_tflop_s", "0.7")):
            floor = [
                max(r["tb_s"] / result["ceilings"]["copy_tb_s"], r["tflop_s"] / result["ceilings"][kind]) * r["us"]
                for r in first
            ]
            axis.plot([r["tokens"] for r in first], floor, ":", color=color, label=f"floor, {label}")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title="skewed routing" if skewed else "uniform routing")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['device']}: one rank of DeepSeek-V4-Pro's MoE layer, {result['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
