# SPDX-License-Identifier: Apache-2.0
"""A whole decode step of an 8B Llama in one CUDA graph: embedding, 32 layers, final norm, lm_head, sampler.

The model's own code (models/llama.py) over full pages in random order, random weights, static inputs. Each shape's
logits are first held against other compositions of the batch, bit for bit; only then is it timed.

    python -m bench.decode_step                              the bars' shapes, on the GPU
    python -m bench.decode_step --tiny --device cpu          a small model: does everything still run?

Exit code 1 if a row's bits depend on what runs beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench._env import ROOT, environment
from bench._timing import measure
from bench.kernel_trace import kernels_of
from bench.random_model import LLAMA_8B, TINY, random_llama, with_qk_norm
from vericache import ops
from vericache.models.interface import RowSpan
from vericache.models.llama import CausalLM

PAGE_SIZE = 64
DATASHEET_RATES = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second of device memory
# Milliseconds a step of vLLM 0.24 on an H200, without and with its batch-invariant mode.
VLLM_MS = {"8 x 8K": (6.9, 19.9), "1 x 128K": (8.8, 53.9)}


@dataclass(frozen=True)
class Shape:
    """Requests of equal length; the rows of request r end at its last position."""

    name: str
    tokens: int
    rows: tuple[int, ...]  # a request
    qk_norm: bool = False


SHAPES = (
    Shape("8 x 8K", 8192, (1,) * 8),
    Shape("8 x 4K", 4096, (1,) * 8),
    Shape("1 x 32K", 32768, (1,)),
    Shape("1 x 128K", 131072, (1,)),
    Shape("8 x 8K, one verifies 31 rows", 8192, (31,) + (1,) * 7),
    Shape("8 x 8K, QK-norm", 8192, (1,) * 8, qk_norm=True),
)


class Pool:
    """Pages of all layers and requests of the largest shape, full of random K and V, in random order."""

    def __init__(self, model: CausalLM, pages: int, generator: torch.Generator):
        c = model.config
        elements = 2 * c.kv_heads * PAGE_SIZE * c.head_dim
        self.page_bytes = elements * model.dtype.itemsize
        self.memory = torch.empty(c.layers * pages, elements, dtype=model.dtype, device=model.device)
        self.memory.normal_(generator=generator)
        order = torch.randperm(c.layers * pages, generator=generator, device=model.device)
        self._addresses = (self.memory.data_ptr() + order * self.page_bytes).view(c.layers, pages)

    def tables(self, requests: int, pages: int) -> Tensor:
        """Addresses, int64 [layers, requests, pages]."""
        layers = self._addresses.shape[0]
        return self._addresses[:, : requests * pages].reshape(layers, requests, pages).contiguous()


class StepView:
    """The model's KVView over tables that are complete before the step begins."""

    page_size = PAGE_SIZE

    def __init__(self, model: CausalLM, tables: Tensor, counts: Sequence[int], positions: Tensor):
        self._config = model.config
        self._tables = tables
        device = positions.device
        self._offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
        self._positions = positions
        self._request = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        self._pages = torch.empty(tables.shape[0], positions.shape[0], dtype=torch.int64, device=device)
        self.place()

    def place(self) -> None:
        """Follow the positions after they changed."""
        self._pages.copy_(self._tables[:, self._request, self._positions.long() // PAGE_SIZE])

    def write_pages(self, layer: int, active: Sequence[int]) -> Tensor:
        """See KVView; all rows are always active here."""
        return self._pages[layer]

    def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
        """See KVView."""
        c = self._config
        return ops.paged_attention(
            q, self._tables[layer], self._offsets, self._positions,
            kv_heads=c.kv_heads, page_size=PAGE_SIZE, scale=c.softmax_scale, settled=True,
        )  # fmt: skip


class Step:
    """One decode step with static inputs: what an engine would replay.

    Args:
        tables: int64 [layers, requests, pages].
        counts: rows of each request.
        tokens, positions: int64 and int32 [rows].
    """

    def __init__(self, model: CausalLM, tables: Tensor, counts: Sequence[int], tokens: Tensor, positions: Tensor):
        rows, device = tokens.shape[0], tokens.device
        self.model, self.tokens, self.positions = model, tokens.clone(), positions.clone()
        self.view = StepView(model, tables, counts, self.positions)
        self._temperature = torch.zeros(rows, device=device)
        self._top_p = torch.ones(rows, device=device)
        self._zeros = torch.zeros(rows, device=device)
        self._top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self._seed = torch.arange(rows, device=device)
        self._drawn = self.positions + 1

    def sample_at(self, temperature: float, top_p: float) -> None:
        """Changes how every row draws."""
        self._temperature.fill_(temperature)
        self._top_p.fill_(top_p)

    def move(self, tokens: Tensor, positions: Tensor) -> None:
        """Other inputs in the same memory."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self._drawn.copy_(positions + 1)
        self.view.place()

    def layers(self, count: int) -> Tensor:
        """Embedding and the first layers."""
        hidden = self.model.embed(self.tokens)
        return self.model.forward(hidden, self.positions, [RowSpan(0, hidden.shape[0], 0, count)], self.view)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, vocab], tokens and log-probabilities [rows]."""
        logits = self.model.logits(self.layers(self.model.config.layers))
        token, logprob = ops.sample(
            logits, self._temperature, self._top_k, self._top_p, self._zeros, self._seed, self._drawn
        )
        return logits, token, logprob


class Graph:
    """A step captured in one CUDA graph; on the CPU the step itself."""

    def __init__(self, step: Step):
        self.step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        if step.tokens.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()  # loads modules, raises limits
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.out = step()

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the step; the results lie in the same memory each time."""
        if self._graph is None:
            self.out = self.step()
        else:
            self._graph.replay()
        return self.out


class Case:
    """One shape's inputs."""

    def __init__(self, model: CausalLM, pool: Pool, shape: Shape, generator: torch.Generator):
        self.model, self.shape = model, shape
        requests = len(shape.rows)
        self.tables = pool.tables(requests, -(-shape.tokens // PAGE_SIZE))
        device, vocab = model.device, model.config.vocab_size
        self.tokens = [torch.randint(vocab, (n,), generator=generator, device=device) for n in shape.rows]
        self.positions = [
            torch.arange(shape.tokens - n, shape.tokens, dtype=torch.int32, device=device) for n in shape.rows
        ]

    def step(self, order: Sequence[int] | None = None) -> Step:
        """All requests, or some in an order of their own."""
        order = range(len(self.shape.rows)) if order is None else order
        return Step(
            self.model, self.tables[:, list(order)].contiguous(), [self.shape.rows[r] for r in order],
            torch.cat([self.tokens[r] for r in order]), torch.cat([self.positions[r] for r in order]),
        )  # fmt: skip

    def one_at_a_time(self, request: int) -> Tensor:
        """Logits of a request's rows, fed one token a step, alone."""
        step = Step(self.model, self.tables[:, [request]].contiguous(), [1], self.tokens[request][:1],
                    self.positions[request][:1])  # fmt: skip
        rows = []
        for i in range(self.shape.rows[request]):
            step.move(self.tokens[request][i : i + 1], self.positions[request][i : i + 1])
            rows.append(step()[0].clone())
        return torch.cat(rows)


def bits_differ(a: Tensor, b: Tensor) -> int:
    """Values of two float32 tensors that differ in any bit."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def invariance(case: Case, graph: Graph) -> dict[str, Any]:
    """Holds the batch's rows against each request alone, one token at a time, and against the batch reversed.

    The control changes one token: its own row must change and no other request's.
    """
    counts = case.shape.rows
    requests = len(counts)
    poison(graph)
    together = graph()[0].clone().split(counts)
    alone = sum(bits_differ(together[r], case.one_at_a_time(r)) for r in range(requests))
    order = list(reversed(range(requests)))
    back = case.step(order)()[0].split([counts[r] for r in order])
    reversed_ = sum(bits_differ(together[r], back[i]) for i, r in enumerate(order))
    kept = graph.step.tokens.clone()
    graph.step.tokens[-1] = (kept[-1] + 1) % case.model.config.vocab_size
    changed = graph()[0].clone().split(counts)
    graph.step.tokens.copy_(kept)
    others = sum(bits_differ(together[r], changed[r]) for r in range(requests - 1))
    graph()
    return {
        "rows_compared": 2 * sum(counts),
        "values_that_differ": alone + reversed_ + others,
        "control_noticed": bits_differ(together[-1][-1], changed[-1][-1]) > 0,
    }


def poison(graph: Graph) -> None:
    """What a step does not write must not look right."""
    if hasattr(graph, "out"):
        graph.out[0].fill_(float("nan"))


def step_bytes(model: CausalLM, shape: Shape) -> dict[str, int]:
    """Bytes a step must read: weights once, the embedding's rows aside, and each request's K and V."""
    w = model.weights
    weights = model.weight_bytes - w.embedding.nbytes - model.cos.nbytes - model.sin.nbytes
    return {"weight_bytes": weights, "kv_bytes": len(shape.rows) * shape.tokens * model.kv_bytes_per_token()}


def copy_rate(device: str, nbytes: int) -> float:
    """Bytes read plus bytes written a second by torch's fastest elementwise copy."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    best = min(
        measure(lambda: target.copy_(source), device, repeats=7).median,
        measure(lambda: torch.neg(source, out=target), device, repeats=7).median,
    )
    return 2 * source.nbytes / best


def datasheet_rate(gpu: str) -> float | None:
    """Bytes a second of a GPU's memory by its datasheet; None if we have not looked it up."""
    return next((rate for name, rate in DATASHEET_RATES.items() if name in gpu), None)


def run_shape(model: CausalLM, pool: Pool, shape: Shape, device: str, copy: float, gpu: str) -> dict[str, Any]:
    """Checks and times one shape."""
    if shape.qk_norm:
        model = with_qk_norm(model)
    case = Case(model, pool, shape, torch.Generator(device).manual_seed(3))
    graph = Graph(case.step())
    row: dict[str, Any] = {"shape": shape.name, "rows": sum(shape.rows), "tokens": shape.tokens}
    row["invariance"] = invariance(case, graph)
    row |= step_bytes(model, shape)
    nbytes = row["weight_bytes"] + row["kv_bytes"]
    rate = datasheet_rate(gpu)
    row["floor_ms"] = {"datasheet": nbytes / rate * 1e3 if rate else None, "copy_rate": nbytes / copy * 1e3}
    timing = measure(graph, device, warmup=3, repeats=30)
    row["ms"] = {"median": timing.median * 1e3, "low": timing.low * 1e3, "high": timing.high * 1e3,
                 "repeats": timing.repeats}  # fmt: skip
    graph.step.sample_at(1.0, 0.95)
    row["sampled_ms"] = measure(graph, device, warmup=3, repeats=15).median * 1e3
    graph.step.sample_at(0.0, 1.0)
    comparable = model.config.layers == LLAMA_8B["num_hidden_layers"] and "H200" in gpu
    vllm = VLLM_MS.get(shape.name) if comparable else None
    row["vllm_ms"], row["vllm_batch_invariant_ms"] = vllm or (None, None)
    if device.startswith("cuda"):
        row["kernels"] = [k.record() for k in kernels_of(graph)]
        layer = kernels_of(lambda: graph.step.layers(1), minus=lambda: graph.step.layers(0))
        row["launches_a_layer"] = sum(k.count for k in layer)
        row["layer_kernels"] = [k.record() for k in layer]
    return row


def show(result: dict[str, Any]) -> None:
    """Prints what a person wants to know."""
    table = Table(title=f"{result['settings']['model']}: one decode step in a CUDA graph")
    for head in ("shape", "rows", "ms", "sampled", "floor datasheet", "floor copy rate", "x floor", "vLLM", "launches",
                 "bits that differ"):  # fmt: skip
        table.add_column(head, justify="left" if head == "shape" else "right")
    for row in result["rows"]:
        vllm = f"{row['vllm_ms']} / {row['vllm_batch_invariant_ms']}" if row["vllm_ms"] else ""
        floor = row["floor_ms"]
        table.add_row(
            row["shape"], str(row["rows"]), f"{row['ms']['median']:.3f}", f"{row['sampled_ms']:.3f}",
            f"{floor['datasheet'] or math.nan:.2f}", f"{floor['copy_rate']:.2f}",
            f"{row['ms']['median'] / floor['copy_rate']:.2f}",
            vllm, str(row.get("launches_a_layer", "")), str(row["invariance"]["values_that_differ"]),
        )  # fmt: skip
    Console(width=150).print(table)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Builds the model, checks, times, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer than the model's, to save time")
    parser.add_argument("--tiny", action="store_true", help="a small model and contexts 64 times shorter")
    parser.add_argument("--only", nargs="+", help="names of shapes")
    parser.add_argument("--out", type=Path, help="default: bench/results/decode-step.json, but for --tiny or --layers")
    arguments = parser.parse_args(argv)
    changes: dict[str, Any] = dict(TINY) if arguments.tiny else {}
    if arguments.layers:
        changes["num_hidden_layers"] = arguments.layers
    shapes = [s for s in SHAPES if not arguments.only or s.name in arguments.only]
    if arguments.tiny:
        shapes = [replace(s, name=f"{s.name} / 64", tokens=max(s.tokens // 64, 64)) for s in shapes]
    device = arguments.device
    model = random_llama(device, **changes)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    pages = max(len(s.rows) * -(-s.tokens // PAGE_SIZE) for s in shapes)
    pool = Pool(model, pages, torch.Generator(device).manual_seed(2))
    copy = copy_rate(device, (1 << 20) if device == "cpu" else (4 << 30))
    c = model.config
    where = environment(device)
    gpu, rate = where.get("gpu", ""), datasheet_rate(where.get("gpu", ""))
    result: dict[str, Any] = {
        "environment": where,
        "settings": {
            "model": f"{c.layers} layers, hidden {c.hidden_size}, {c.q_heads}/{c.kv_heads} heads of {c.head_dim}, "
            f"intermediate {c.intermediate_size}, vocabulary {c.vocab_size}, {str(model.dtype)[6:]}",
            "page_size": PAGE_SIZE,
        },
        "ceilings": {"datasheet_gb_s": rate / 1e9 if rate else None, "copy_gb_s": copy / 1e9},
        "rows": [run_shape(model, pool, shape, device, copy, gpu) for shape in shapes],
    }
    show(result)
    out = arguments.out or (None if changes else ROOT / "bench" / "results" / "decode-step.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    checks = [row["invariance"] for row in result["rows"]]
    return int(any(check["values_that_differ"] or not check["control_noticed"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())
