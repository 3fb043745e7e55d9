# SPDX-License-Identifier: Apache-2.0
"""Draws README.md's picture from bench/results/exactness.json: right answers by kind of exercise and mode.

python -m bench.plots
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench._env import ROOT

COLORS = {"full": "#4c566a", "lossy": "#bf616a", "vericache": "#5e81ac"}


def draw(result: Path, out: Path) -> None:
    """Writes one SVG: a group of bars a kind of exercise, a bar a configuration."""
    rows = json.loads(result.read_text())["rows"]
    kinds = list(rows[0]["exact_by_kind"])
    plt.rcParams["svg.hashsalt"] = "vericache"  # the same figures give the same file
    figure, axis = plt.subplots(figsize=(8, 3))
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        share = [100 * right / asked for right, asked in row["exact_by_kind"].values()]
        at = [k - 0.4 + (i + 0.5) * width for k in range(len(kinds))]
        label = row["mode"] if row["mode"] == "full" else f"{row['mode']}, {row['compressor']}"
        hatch = "//" if row["compressor"] and row["compressor"].startswith("kivi") else None
        axis.bar(at, share, width * 0.92, label=label, color=COLORS[row["mode"]], hatch=hatch, edgecolor="white")
    axis.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axis.set_ylabel("right answers, %")
    axis.set_ylim(0, 104)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Draws what there is."""
    result = ROOT / "bench" / "results" / "exactness.json"
    if not result.exists():
        print(f"{result.relative_to(ROOT)} does not exist; run python -m bench.exactness first", file=sys.stderr)
        return 1
    draw(result, ROOT / "docs" / "exactness.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
