# SPDX-License-Identifier: Apache-2.0
"""What compression costs, and that verification gives it back: held-out exercises in every mode.

Each exercise runs in full, in lossy and in vericache with each compressor. The result says how often the
answer is right, how often all tokens equal full KV's, how many tokens a round yields and how many bytes a
token fetches.

    python -m bench.exactness                        all of it, continuing where an earlier call stopped
    python -m bench.exactness --shard 0/2            half of it; run the other shards elsewhere or later (on one
                                                     machine: each under taskset, with cores of its own)
    python -m bench.exactness --summarize            only write the result from what the shards left in --work

Exit code 1 if vericache differs from full in any token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer

from bench._env import ROOT, command_line, environment, fingerprint
from tools.train_nano.exercises import Exercise, make_exercise
from tools.train_nano.world import KINDS
from vericache import LLM, SamplingParams, ops
from vericache.models import find_model

FIRST_SEED = 9_000_000  # away from the seeds that the model card scores
FULL = "full"


@dataclass(frozen=True)
class Config:
    """One way of running the exercises."""

    mode: str
    compressor: str

    @property
    def label(self) -> str:
        """The key in records and results."""
        return self.mode if self.mode == FULL else f"{self.mode} {self.compressor}"


@dataclass(frozen=True)
class Task:
    """One exercise, by what it is made from."""

    kind: str
    tokens: int
    seed: int

    @property
    def key(self) -> str:
        """The key in records."""
        return f"{self.kind}/{self.tokens}/{self.seed}"


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """Lists the exercises: lengths and kinds take turns, so that any beginning is a fair sample."""
    found = []
    for i in range(arguments.count):
        kind = KINDS[i % len(KINDS)]
        tokens = arguments.tokens[i // len(KINDS) % len(arguments.tokens)]
        found.append(Task(kind, tokens, FIRST_SEED + i))
    return found


def configs_of(compressors: Sequence[str]) -> list[Config]:
    """Lists the ways to run: full once, lossy and vericache with each compressor."""
    return [Config(FULL, compressors[0])] + [Config(m, c) for c in compressors for m in ("lossy", "vericache")]


def record(config: Config, task: Task, exercise: Exercise, output: Any, mark: str) -> dict[str, Any]:
    """Turns an output into a line of the work file."""
    gaps = []
    for row in output.logits or ():
        best = row.float().topk(2).values
        gaps.append(round(float(best[0] - best[1]), 6))
    return {
        "fingerprint": mark,
        "config": config.label,
        "task": task.key,
        "kind": task.kind,
        "prompt_tokens": output.prompt_tokens,
        "exact": output.text == exercise.answer,
        "token_ids": list(output.token_ids),
        "top2_gaps": gaps,
        "finish_reason": output.finish_reason,
        "error": output.error,
        "stats": asdict(output.stats),
    }


def read_records(work: Path, mark: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads what earlier calls left, by (config, task); lines of other sources are not taken."""
    found = {}
    for path in sorted(work.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            # A call that was ended while writing leaves half a line.
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["fingerprint"] == mark and entry["error"] is None:
                found[entry["config"], entry["task"]] = entry
    return found


def chunks(items: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    """Cuts a list into pieces."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run(arguments: argparse.Namespace, mark: str) -> None:
    """Runs what this shard still lacks, one batch of exercises after the other."""
    if arguments.threads:
        ops.set_num_threads(arguments.threads)
        torch.set_num_threads(arguments.threads)
    shard, shards = arguments.shard
    mine = tasks_of(arguments)[shard::shards]
    configs = configs_of(arguments.compressor)
    done = read_records(arguments.work, mark)
    llms: dict[Config, LLM] = {}
    tokenizer = Tokenizer.from_file(str(find_model(arguments.model) / "tokenizer.json"))
    arguments.work.mkdir(parents=True, exist_ok=True)
    params = SamplingParams(max_tokens=arguments.max_tokens)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    (arguments.work / f"shard-{shard}-of-{shards}.env.json").write_text(json.dumps(environment(device)) + "\n")
    with (arguments.work / f"shard-{shard}-of-{shards}.jsonl").open("a") as file:
        for batch in chunks(mine, arguments.batch):
            for config in configs:
                missing = [task for task in batch if (config.label, task.key) not in done]
                if not missing:
                    continue
                if config not in llms:
                    llms[config] = LLM(
                        arguments.model,
                        mode=config.mode,  # type: ignore[arg-type]
                        compressor=config.compressor,
                        device=arguments.device,
                        draft_len=arguments.draft_len,
                        record_logits=config.mode == FULL,
                    )
                llm = llms[config]
                exercises = [make_exercise(t.kind, t.tokens, t.seed, tokenizer) for t in missing]
                start = time.perf_counter()
                outputs = llm.generate([e.prompt_ids for e in exercises], params)
                for task, exercise, output in zip(missing, exercises, outputs, strict=True):
                    entry = record(config, task, exercise, output, mark)
                    done[config.label, task.key] = entry
                    file.write(json.dumps(entry) + "\n")
                file.flush()
                right = sum(done[config.label, t.key]["exact"] for t in missing)
                seconds = time.perf_counter() - start
                print(
                    f"{missing[0].key} +{len(missing)}: {config.label}: {right} right, {seconds:.1f} s",
                    flush=True,
                )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Returns the first index where two token sequences differ, or None."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def summarize(arguments: argparse.Namespace, mark: str) -> dict[str, Any]:
    """Adds up the records of all shards.

    Raises:
        SystemExit: if some are missing.
    """
    tasks, configs = tasks_of(arguments), configs_of(arguments.compressor)
    records = read_records(arguments.work, mark)
    missing = sum((c.label, t.key) not in records for c in configs for t in tasks)
    if missing:
        sys.exit(f"{missing} of {len(configs) * len(tasks)} runs are missing in {arguments.work}: run all shards")
    machines = [json.loads(path.read_text()) for path in sorted(arguments.work.glob("*.env.json"))]
    machines = [machine for machine in machines if machine["fingerprint"] == mark]
    full = [records[FULL, task.key] for task in tasks]
    rows = []
    for config in configs:
        mine = [records[config.label, task.key] for task in tasks]
        rows.append(summary_row(config, tasks, mine, full))
    return {
        "environment": machines[0],
        "shards": len(machines),
        # Of a run that is added up apart: which of its exercises count is said here, not by the shards' command.
        "summary_command": command_line() if arguments.summarize else None,
        "other_machines": [machine for machine in machines if not same_machine(machine, machines[0])],
        "settings": {
            "model": arguments.model,
            "exercises": len(tasks),
            "target_tokens": arguments.tokens,
            "prompt_tokens_total": sum(entry["prompt_tokens"] for entry in full),
            "draft_len": arguments.draft_len,
            "max_tokens": arguments.max_tokens,
            "sampling": "greedy",
            "first_seed": FIRST_SEED,
        },
        "rows": rows,
    }


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tells whether two shards' figures come from the same kind of machine and versions."""
    return all(a.get(name) == b.get(name) for name in ("cpu", "cores", "gpu", "torch", "python"))


def summary_row(
    config: Config, tasks: Sequence[Task], mine: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Adds up one configuration."""
    differences = []
    for task, own, reference in zip(tasks, mine, full, strict=True):
        index = first_difference(reference["token_ids"], own["token_ids"])
        if index is not None:
            expected, got = (entry["token_ids"][index : index + 1] for entry in (reference, own))
            gap = reference["top2_gaps"][index] if index < len(reference["top2_gaps"]) else None
            differences.append({"task": task.key, "index": index, "expected": expected, "got": got, "top2_gap": gap})
    kinds = {kind: [own for own in mine if own["kind"] == kind] for kind in KINDS}

    def total(name: str, entries: Iterable[dict[str, Any]] = mine) -> int:
        return sum(entry["stats"][name] for entry in entries)

    rounds, emitted = total("rounds"), total("emitted")
    return {
        "config": config.label,
        "mode": config.mode,
        "compressor": None if config.mode == FULL else config.compressor,
        "exercises": len(mine),
        "exact": sum(entry["exact"] for entry in mine),
        "exact_by_kind": {k: [sum(e["exact"] for e in entries), len(entries)] for k, entries in kinds.items()},
        "identical_to_full": len(mine) - len(differences),
        "median_first_difference": median(d["index"] for d in differences) if differences else None,
        "tokens": sum(len(entry["token_ids"]) for entry in mine),
        "rounds": rounds,
        "accepted_per_round": total("accepted") / rounds if rounds else None,
        "fetched_bytes_per_token": total("fetched_bytes") / emitted if rounds and emitted else None,
        # Lossy is expected to differ: only a vericache row lists where.
        "differences": differences if config.mode == "vericache" else [],
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""

    def shard(text: str) -> tuple[int, int]:
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise argparse.ArgumentTypeError(f"a shard is written 0/4, not {text!r}")
        return int(index), int(count)

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="vericache-nano")
    parser.add_argument("--count", type=int, default=200, help="exercises in all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="prompt lengths, taking turns")
    parser.add_argument("--compressor", nargs="+", default=["snapkv:ratio=0.25", "kivi:bits=2"])
    parser.add_argument("--draft-len", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="exercises that run together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--threads", type=int, help="threads of this shard (default: every core)")
    parser.add_argument("--shard", type=shard, default=(0, 1))
    parser.add_argument("--summarize", action="store_true", help="run nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "exactness", help="where shards keep their lines")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "exactness.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, and writes the result if this was the only shard."""
    arguments = parse(argv)
    mark = fingerprint()
    if not arguments.summarize:
        run(arguments, mark)
        if arguments.shard[1] > 1:
            return 0
    result = summarize(arguments, mark)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(
            f"{row['config']}: {row['exact']}/{row['exercises']} right, "
            f"{row['identical_to_full']}/{row['exercises']} identical to full"
        )
    return 1 if any(row["differences"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
