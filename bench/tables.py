# SPDX-License-Identifier: Apache-2.0
"""Writes the measured tables of README.md from bench/results, between markers that name the file.

python -m bench.tables           write
python -m bench.tables --check   exit code 1 if README.md does not say what the results say
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench._env import ROOT
from bench.gpu_programs import figure, met

MARKER = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def where(environment: dict[str, Any]) -> str:
    """Says in one line where figures come from."""
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['cores']} cores"
    driver = f", driver {environment['driver']}" if "driver" in environment else ""
    return (
        f"Measured on {machine}{driver}; torch {environment['torch']}, Python {environment['python']}, "
        f"commit {environment['commit'][:10]}, {environment['date']}: `{environment['command']}`.\n"
    )


def exactness(result: dict[str, Any]) -> str:
    """The table of bench/exactness.py."""
    rows = []
    for row in result["rows"]:
        kinds = [f"{right}/{asked}" for right, asked in row["exact_by_kind"].values()]
        accepted, fetched = row["accepted_per_round"], row["fetched_bytes_per_token"]
        rows.append(
            [
                row["mode"] if row["mode"] == "full" else f"{row['mode']}, `{row['compressor']}`",
                f"{100 * row['exact'] / row['exercises']:.1f}%",
                *kinds,
                f"{row['identical_to_full']}/{row['exercises']}",
                f"{accepted:.1f}" if accepted is not None else "",
                f"{fetched / 1024:.0f} KiB" if fetched is not None else "",
            ]
        )
    kinds = [kind.replace("_", " ") for kind in result["rows"][0]["exact_by_kind"]]
    head = [
        "mode",
        "right answers",
        *kinds,
        "all tokens equal full KV's",
        "tokens a round",
        "fetched a token",
    ]
    settings = result["settings"]
    lengths = " and ".join(str(n) for n in settings["target_tokens"])
    caption = (
        f"{settings['model']}, {settings['exercises']} held-out exercises of about {lengths} tokens, greedy, "
        f"draft length {settings['draft_len']}. "
    )
    if result.get("summary_command"):
        caption += f"Added up by `{result['summary_command']}`. "
    return table(head, rows) + "\n" + caption + where(result["environment"])


def kernels(result: dict[str, Any]) -> str:
    """The table of bench/gpu_kernels.py: what each kernel is held against, and the bar we set ourselves."""
    rows = []
    for family in ("attention", "dense"):
        for row in result.get(family, {}).get("bars", []):
            us = "" if row["us"] is None else f"{row['us']:.1f}"
            holds = "yes" if met(row) else "no"
            rows.append([row["what"], us, row["against"], figure(row, "ratio"), figure(row, "bar"), holds])
    checks = [c for family in ("attention", "dense") for c in result.get(family, {}).get("checks", [])]
    passed = sum(c["ok"] for c in checks)
    caption = f"{passed} of {len(checks)} kernel checks pass (bitwise invariance, accuracy, untouched memory). "
    head = ["kernel", "us", "against", "measured", "bar", "met"]
    return table(head, rows) + "\n" + caption + where(result["environment"])


def decode_step(result: dict[str, Any]) -> str:
    """The table of bench/decode_step.py."""
    rows = []
    for row in result["rows"]:
        ms, floor = row["ms"]["median"], row["floor_ms"]
        vllm = [f"{row[key]:.1f}" if row[key] else "" for key in ("vllm_ms", "vllm_batch_invariant_ms")]
        read = (row["weight_bytes"] + row["kv_bytes"]) / 1e9
        rows.append([
            row["shape"], f"{read:.1f} GB", ", ".join(f"{f:.2f}" for f in floor.values() if f), f"{ms:.2f}",
            f"{ms / floor['copy_rate']:.2f}x", f"{row['sampled_ms']:.2f}", *vllm, str(row.get("launches_a_layer", "")),
        ])  # fmt: skip
    head = ["requests", "weights and KV", "floor, ms", "ms a step", "of the floor", "sampled", "vLLM",
            "vLLM, batch-invariant", "launches a layer"]  # fmt: skip
    checks = [row["invariance"] for row in result["rows"]]
    compared, differ = (sum(c[key] for c in checks) for key in ("rows_compared", "values_that_differ"))
    rates = result["ceilings"]
    datasheet = f"the datasheet's {rates['datasheet_gb_s']:.0f} GB/s and over " if rates["datasheet_gb_s"] else ""
    against = any(row["vllm_ms"] for row in result["rows"])
    caption = (
        f"{result['settings']['model']}, random weights. Floors: bytes over {datasheet}the "
        f"{rates['copy_gb_s']:.0f} GB/s of a copy in the same run. "
        f"Before timing, "
        f"{compared} rows of logits were compared with each request alone, one token a step, and with the batch "
        f"reversed: {differ} values differ. " + ("vLLM 0.24: on an H200, the same shape. " if against else "")
    )
    return table(head, rows) + "\n" + caption + where(result["environment"])


def gpu_checks(result: dict[str, Any]) -> str:
    """The bitwise table of bench/gpu_checks.py, and what compute-sanitizer said."""
    rows = [
        [row["shape"], row["row_counts"], f"{row['compared']:,}", str(row["different"]),
         "noticed" if row["control_noticed"] else "missed"]
        for row in result["bitwise"]
    ]  # fmt: skip
    checks = [c for family in ("attention", "dense") for c in result[family]["checks"]]
    runs = result["sanitizer"]["runs"]
    said = [f"{run['tool']} of `{run['program']}`: {run['summary']}" for run in runs if not run.get("clean")]
    for tool in sorted({run["tool"] for run in runs}):
        if clean := [run for run in runs if run["tool"] == tool and run.get("clean")]:
            said.append(f"{tool} finds nothing in {sum(run['checks_run'] for run in clean)} checks")
    caption = f"{sum(c['ok'] for c in checks)} of {len(checks)} kernel checks pass. "
    caption += f"compute-sanitizer, small cases: {'; '.join(said)}. " if said else ""
    caption += f"Tests on the GPU: {result['pytest']['summary']}. " if "pytest" in result else ""
    head = ["kernel", "rows a request, or M", "rows compared with the same row alone", "values that differ", "control"]
    return table(head, rows) + "\n" + caption + where(result["environment"])


def engine_shape(result: dict[str, Any]) -> str:
    """One sentence from the engine's runs on the 8B shape (tests/engine/test_8b_shape.py)."""
    r = result["result"]
    norm = ", with QK-norm," if r["qk_norm"] else ""
    return (
        f"C1 and C2 with {r['layers']} layers of an 8B Llama{norm} and prompts of 1000 to 3001 tokens, `full` and "
        f"`vericache` with {len(r['compressors'])} compressors: {r['differences']} differences in {r['tokens']:,} "
        f"emitted tokens, {r['drafted'] - r['matched']:,} of {r['drafted']:,} drafted tokens rejected. "
        + where(result["environment"])
    )


def engine_exactness(result: dict[str, Any]) -> str:
    """One sentence from the GPU's random engine runs (tests/engine/test_exactness_cuda.py)."""
    r = result["result"]
    return (
        f"C1 and C2 on the GPU: {r['differences']} differences in {r['tokens']:,} emitted tokens "
        f"of {r['requests']} requests "
        f"in {r['runs']} random runs, in which {r['drafted'] - r['matched']:,} of {r['drafted']:,} drafted tokens were "
        "rejected. " + where(result["environment"])
    )


WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "exactness.json": exactness,
    "exactness-gpu.json": exactness,
    "acceptance.json": exactness,
    "gpu-kernels.json": kernels,
    "engine-exactness-gpu.json": engine_exactness,
    "engine-8b-shape-gpu.json": engine_shape,
    "engine-8b-qk-norm-shape-gpu.json": engine_shape,
    "gpu-kernels-h100.json": kernels,
    "decode-step.json": decode_step,
    "decode-step-h100.json": decode_step,
    "gpu-checks.json": gpu_checks,
}


def fill(text: str) -> str:
    """Returns the text with every marked table written anew, and empty where its result does not exist."""

    def write(match: re.Match[str]) -> str:
        path = ROOT / "bench" / "results" / match["name"]
        body = WRITERS[match["name"]](json.loads(path.read_text())) if path.exists() else ""
        return match[1] + body + match[3]

    return MARKER.sub(write, text)


def main(argv: Sequence[str]) -> int:
    """Writes or checks README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    filled = fill(text)
    if "--check" in argv:
        return int(text != filled)
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
