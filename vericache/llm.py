# SPDX-License-Identifier: Apache-2.0
"""`LLM`: load a model, generate text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from vericache.config import EngineConfig, Mode, SamplingParams
from vericache.engine.engine import Engine
from vericache.engine.request import Phase, Request
from vericache.errors import InvalidRequestError
from vericache.models.checkpoint import find_model, load_model
from vericache.models.tokenizer import Tokenizer, load_tokenizer
from vericache.outputs import RequestOutput, StreamChunk

Progress = Callable[[str, float], None]  # what is being done, share done in 0..1


class LLM:
    """A model behind an engine.

    Args:
        model: name of an embedded model (``vericache-nano``) or a Hugging Face checkpoint folder.
        mode, compressor, draft_len, page_size, prefill_chunk, max_batch, record_logits, memory_budget,
            host_budget: see EngineConfig.
        config: a whole EngineConfig instead of those fields.
        dtype: storage dtype, ``float32`` or ``bfloat16``; None takes the checkpoint's.
        device: None takes a GPU where the build and the machine have one.
        progress: called with what is being done and the share done.

    Raises:
        CheckpointError, UnsupportedModelError: the checkpoint is missing, broken or of an unsupported kind.
        CapacityError: the weights do not fit the budget.
        InvalidRequestError: an option is out of range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        mode: Mode = "vericache",
        compressor: str = "snapkv:ratio=0.25",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory_budget: int | str | None = None,
        host_budget: int | str | None = None,
        draft_len: int = 16,
        page_size: int = 64,
        prefill_chunk: int = 256,
        max_batch: int = 32,
        record_logits: bool = False,
        config: EngineConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.folder = find_model(model)
        self.device = _pick_device(device)
        if config is None:
            config = EngineConfig(
                mode=mode,
                compressor=compressor,
                draft_len=draft_len,
                page_size=page_size,
                prefill_chunk=prefill_chunk,
                max_batch=max_batch,
                record_logits=record_logits,
                memory_budget=memory_budget or _default_budget(self.device),
                host_budget=host_budget,
            )
        self.config = config
        self._progress = progress
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        self.model = load_model(self.folder, dtype=_dtype(dtype), device=self.device)
        self.engine = Engine(self.model, config, self.tokenizer.decode)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for a batch of prompts, in order.

        Args:
            prompts: texts or lists of token ids; a single text is a batch of one.
            params: one for all, or one a prompt; None is greedy.

        Raises:
            InvalidRequestError, CapacityError: a prompt cannot run; raised before any work.
        """
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        each = (
            [params or SamplingParams()] * len(batch)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        if len(each) != len(batch):
            raise InvalidRequestError(f"got {len(each)} sampling parameters for {len(batch)} prompts; give one each")
        requests: list[Request] = []
        try:
            for prompt, p in zip(batch, each, strict=True):
                requests.append(self.submit(prompt, p))
        except Exception:
            for request in requests:
                self.engine.cancel(request)
            raise
        while any(r.phase is not Phase.FINISHED for r in requests):
            self.engine.step()
            self._report(requests)
        return [r.output() for r in requests]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Generate for one prompt, yielding text as it is verified. Closing the iterator cancels the request."""
        request = self.submit(prompt, params or SamplingParams())
        seen, shown = 0, ""
        try:
            while True:
                self.engine.step()
                self._report([request])
                done = request.phase is Phase.FINISHED
                emitted = request.emitted
                if len(emitted) > seen or done:
                    text = request.text() if done else self._safe_text(request)
                    fresh = text[len(shown) :] if text.startswith(shown) else ""
                    shown += fresh
                    yield StreamChunk(
                        request.id, tuple(emitted[seen:]), fresh, done, request.finish_reason, request.error
                    )
                    seen = len(emitted)
                if done:
                    return
        finally:
            self.engine.cancel(request)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """Queue one prompt and return its handle; drive it with ``engine.step()``."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        return self.engine.add(tokens, params)

    def _safe_text(self, request: Request) -> str:
        """Text that later tokens cannot change: half a character or a possible stop string is held back."""
        text = request.text().rstrip("\ufffd")
        held = max((n for s in request.params.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - held]

    def _report(self, requests: Sequence[Request]) -> None:
        if self._progress is None:
            return
        for request in requests:
            if request.phase is Phase.PREFILL:
                self._progress("prefill", self.engine.prefill_fraction(request))
                return
        done = sum(r.max_emit if r.phase is Phase.FINISHED else len(r.emitted) for r in requests)
        self._progress("generate", done / max(1, sum(r.max_emit for r in requests)))


def _pick_device(device: torch.device | str | None) -> torch.device:
    from vericache import _C

    if device is not None:
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise InvalidRequestError(f"device '{device}' is not supported; use cpu or cuda") from None
        if chosen.type not in ("cpu", "cuda"):
            raise InvalidRequestError(f"device '{device}' is not supported; use cpu or cuda")
        if chosen.type == "cuda" and not (_C.with_cuda and torch.cuda.is_available()):
            raise InvalidRequestError(f"device '{device}' needs a GPU and a build with CUDA; use device='cpu'")
        return chosen
    return torch.device("cuda" if _C.with_cuda and torch.cuda.is_available() else "cpu")


def _default_budget(device: torch.device) -> int | str:
    if device.type == "cpu":
        return "4GiB"
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * 0.9)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype is None or dtype in names.values():
        return dtype  # type: ignore[return-value]
    if dtype in names:
        return names[str(dtype)]
    raise InvalidRequestError(f"dtype '{dtype}' is not supported; use float32 or bfloat16")
