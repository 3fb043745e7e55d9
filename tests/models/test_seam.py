# SPDX-License-Identifier: Apache-2.0
"""One forward function, any arrangement of rows and layers: the bits are those of each request alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bytes
from tests.models.tiny_checkpoints import kind_named, make_prompt, write_checkpoint
from vericache import ops
from vericache.models import CausalLM, RowSpan, load_model
from vericache.models.llama import LayerWeights
from vericache.reference import ReferenceCache, prefill

PAGE = 16
LAYERS = 3
CASES = [
    pytest.param((name, dtype, device), id=f"{name}-{str(dtype)[6:]}-{device}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.cuda))
    for name, dtype in (
        ("llama2", torch.float32),
        ("mistral-window", torch.float32),
        ("llama-biases", torch.bfloat16),
        ("qwen3-window", torch.bfloat16),
    )
]


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    name, dtype, device = request.param
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(kind_named(name), folder)
    return load_model(folder, dtype=dtype, device=device)


class Request:
    """One request with its own full cache, filled up to `cached` tokens, and the rows that come next."""

    def __init__(self, model: CausalLM, cached: int, rows: int, seed: int):
        prompt = make_prompt(cached + rows, seed)
        self.cache = ReferenceCache(model, cached + rows, PAGE)
        poison(self.cache)
        if cached:
            prefill(model, prompt[:cached], self.cache, prefill_chunk=32)
        self.tokens = torch.tensor(prompt[cached:], device=model.device)
        self.positions = torch.arange(cached, cached + rows, dtype=torch.int32, device=model.device)


class Batch:
    """`KVView` over several requests, one span each, as an engine would build it."""

    page_size = PAGE

    def __init__(self, model: CausalLM, requests: Sequence[Request]):
        self.config = model.config
        self.requests = requests
        self.tokens = torch.cat([request.tokens for request in requests])
        self.positions = torch.cat([request.positions for request in requests])

    def spans(self, layers: Sequence[tuple[int, int]]) -> list[RowSpan]:
        """One span a request, with the given layer ranges."""
        spans, start = [], 0
        for request, (lo, hi) in zip(self.requests, layers, strict=True):
            spans.append(RowSpan(start, start + len(request.tokens), lo, hi))
            start = spans[-1].stop
        return spans

    def write_pages(self, layer: int, active: Sequence[int]) -> Tensor:
        requests = [self.requests[i] for i in active]
        return torch.cat([r.cache.page_table(layer)[0, r.positions.long() // PAGE] for r in requests])

    def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
        requests = [self.requests[i] for i in active]
        tables = [r.cache.page_table(layer)[0] for r in requests]
        table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
        offsets = torch.tensor([0, *(len(r.tokens) for r in requests)], device=q.device).cumsum(0).int()
        positions = torch.cat([r.positions for r in requests])
        c = self.config
        return ops.paged_attention(
            q,
            table,
            offsets,
            positions,
            kv_heads=c.kv_heads,
            page_size=PAGE,
            scale=c.softmax_scale,
            window=c.windows[layer],
        )


def page_bytes(cache: ReferenceCache) -> list[bytes]:
    """All K and V bytes, slots never written included (they are poisoned alike)."""
    pages = []
    for layer, memory in enumerate(cache.memory):
        start = int(cache.page_table(layer)[0, 0]) - memory.data_ptr()
        size = cache.page_table(layer).shape[1] * cache.page_stride
        pages.append(memory[start : start + size].cpu().numpy().tobytes())
    return pages


def poison(cache: ReferenceCache) -> None:
    """NaN everywhere, so that a read of a slot nobody wrote cannot go unnoticed."""
    for memory in cache.memory:
        memory.fill_(0xFF)


def run(model: CausalLM, requests: Sequence[Request], *steps: Sequence[tuple[int, int]]) -> Tensor:
    """Feeds all rows of the requests, one forward call a step; the residual stream afterwards."""
    batch = Batch(model, requests)
    hidden = model.embed(batch.tokens)
    for layers in steps:
        hidden = model.forward(hidden, batch.positions, batch.spans(layers), batch)
    return hidden


ALL = (0, LAYERS)
# Cached tokens and new rows of each request: page - 1, page, page + 1; one row and many.
SHAPES = [(0, 17), (15, 1), (16, 3), (61, 1), (33, 16)]


def fresh(model: CausalLM) -> list[Request]:
    return [Request(model, cached, rows, seed) for seed, (cached, rows) in enumerate(SHAPES)]


def test_a_mixed_batch_equals_each_request_alone(model: CausalLM) -> None:
    together = fresh(model)
    hidden = run(model, together, [ALL] * len(SHAPES))
    logits = model.logits(hidden)
    start = 0
    for request, mate in zip(fresh(model), together, strict=True):
        alone = run(model, [request], [ALL])
        rows = slice(start, start + len(request.tokens))
        assert not alone.isnan().any()
        assert_same_bytes(hidden[rows], alone)
        assert_same_bytes(logits[rows], model.logits(alone))
        assert page_bytes(mate.cache) == page_bytes(request.cache)
        start = rows.stop


@pytest.mark.parametrize(
    "steps",
    [
        [[(0, 1)] * 5, [(1, 3)] * 5],
        [[(0, 1)] * 5, [(1, 2)] * 5, [(2, 3)] * 5],
        # Rows ride along in layers of their own; the active rows are a prefix, a suffix, a set with holes.
        [[(0, 2), ALL, (0, 1), ALL, (0, 0)],
         [(2, 3), (3, 3), (1, 2), (3, 3), (0, 2)],
         [(3, 3), (3, 3), (2, 3), (3, 3), (2, 3)]],
        [[(0, 0), (0, 0), ALL, (0, 0), (0, 0)], [(0, 3), (0, 3), (3, 3), (0, 3), (0, 3)]],
    ],
    ids=["two-halves", "layer-by-layer", "riding-along", "one-then-the-others"],
)  # fmt: skip
def test_layers_may_be_spread_over_calls(model: CausalLM, steps: list[list[tuple[int, int]]]) -> None:
    at_once, spread = fresh(model), fresh(model)
    expected = run(model, at_once, [ALL] * len(SHAPES))
    assert_same_bytes(run(model, spread, *steps), expected)
    for one, other in zip(at_once, spread, strict=True):
        assert page_bytes(one.cache) == page_bytes(other.cache)


def test_a_skipped_layer_shows(model: CausalLM) -> None:
    """Negative control: the comparison above sees one row that missed one layer."""
    expected = run(model, fresh(model), [ALL] * len(SHAPES))
    wrong = run(model, fresh(model), [ALL, (0, 2), ALL, ALL, ALL])
    assert not torch.equal(wrong[17:18], expected[17:18])
    assert_same_bytes(wrong[:17], expected[:17])
    assert_same_bytes(wrong[18:], expected[18:])


def test_rows_outside_their_layers_stay(model: CausalLM) -> None:
    """Waiting rows, rows of no span and the argument itself keep their bytes."""
    request = Request(model, 5, 4, seed=9)
    batch = Batch(model, [request])
    hidden = model.embed(torch.tensor([7, *request.tokens.tolist(), 8, 9], device=model.device))
    before = hidden.clone()
    positions = torch.tensor([0, *request.positions.tolist(), 0, 0], dtype=torch.int32, device=model.device)
    advanced = model.forward(hidden, positions, [RowSpan(1, 5, 0, LAYERS)], batch)
    assert_same_bytes(hidden, before)
    assert_same_bytes(advanced[[0, 5, 6]], before[[0, 5, 6]])
    assert_same_bytes(advanced[1:5], run(model, [Request(model, 5, 4, seed=9)], [ALL]))
    for span in (RowSpan(1, 5, 2, 2), RowSpan(3, 3, 0, LAYERS)):
        assert_same_bytes(model.forward(hidden, positions, [span], batch), before)
    assert_same_bytes(model.forward(hidden, positions, [], batch), before)


@pytest.mark.parametrize("chunk", [16, 32, 61])
def test_layer_major_prefill_equals_chunk_major(model: CausalLM, chunk: int) -> None:
    """Rule R3's two orders: every chunk through all layers, or every layer over all chunks."""
    prompt = make_prompt(77)
    chunk_major = ReferenceCache(model, len(prompt), PAGE)
    poison(chunk_major)
    last = prefill(model, prompt, chunk_major, chunk)
    layer_major = ReferenceCache(model, len(prompt), PAGE)
    poison(layer_major)
    hidden = model.embed(torch.tensor(prompt, device=model.device))
    for layer in range(LAYERS):
        for start in range(0, len(prompt), chunk):
            rows = slice(start, min(start + chunk, len(prompt)))
            positions = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=model.device)
            layer_major.place(positions)
            span = RowSpan(0, len(positions), layer, layer + 1)
            hidden[rows] = model.forward(hidden[rows], positions, [span], layer_major)
    assert_same_bytes(hidden[-1:], last)
    assert page_bytes(layer_major) == page_bytes(chunk_major)


def test_one_token_at_a_time_equals_one_call(model: CausalLM) -> None:
    """The exactness contract in small: a verify call of many rows, and decoding row by row."""
    prompt = make_prompt(50)
    many, single = ReferenceCache(model, 50, PAGE), ReferenceCache(model, 50, PAGE)
    poison(many)
    poison(single)
    prefill(model, prompt, many, 50)
    last = prefill(model, prompt, single, 1)
    assert_same_bytes(prefill(model, prompt, many, 50), last)
    assert page_bytes(many) == page_bytes(single)


def test_kv_write_is_by_position(model: CausalLM) -> None:
    """A page address of 0 writes nothing: the pages keep their poison."""
    request = Request(model, 0, 3, seed=1)

    class Silent(Batch):
        def write_pages(self, layer: int, active: Sequence[int]) -> Tensor:
            return torch.zeros(3, dtype=torch.int64, device=model.device)

        def attend(self, layer: int, q: Tensor, active: Sequence[int]) -> Tensor:
            return q

    batch = Silent(model, [request])
    model.forward(model.embed(batch.tokens), batch.positions, batch.spans([ALL]), batch)
    assert all(set(page) == {0xFF} for page in page_bytes(request.cache))


def test_shapes_of_the_weights(model: CausalLM) -> None:
    layer: LayerWeights = model.weights.layers[0]
    c = model.config
    assert layer.qkv.shape == (c.qkv_size, c.hidden_size)
    assert layer.gate_up.shape == (2 * c.intermediate_size, c.hidden_size)
    assert all(t.dtype == model.dtype and t.is_contiguous() for t in layer if t is not None)
    assert model.kv_bytes_per_token() == 2 * LAYERS * c.kv_heads * c.head_dim * model.dtype.itemsize
