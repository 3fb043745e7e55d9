# SPDX-License-Identifier: Apache-2.0
"""Trains vericache-nano within a fixed time.

    python -m tools.train_nano.train --out runs/nano --tokenizer vericache/assets/vericache-nano --minutes 11

The schedule (row lengths, learning rate) follows the training time, so a run ends on time on any GPU. A run
may be cut into legs (`--leg-minutes`) and continued with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .card import write_card
from .data import ANSWERED, Feeder, save_filler
from .evaluate import evaluate
from .export import export
from .filler import build_filler
from .model import Nano, NanoConfig, pick_backend
from .optim import NanoOptimizer, learning_rate_scale
from .sources import iter_sources, permissive_packages

# Loss weights of the codes data.SOURCE (records too), PASSAGE, ASKED and ANSWERED.
CODE_WEIGHTS = (0.1, 0.05, 0.1, 1.0)
WARM_STEPS = 300


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model, the log and the scores")
    add("--tokenizer", type=Path, required=True, help="folder with tokenizer.json (see prepare.py)")
    add("--work", type=Path, help="folder for the checkpoint and the tokenised source (default: OUT/work)")
    add("--resume", type=Path, help="folder with a checkpoint.pt to continue from")
    add("--minutes", type=float, default=11.0, help="training time of the whole schedule")
    add("--leg-minutes", type=float, help="stop this process's training after this time, to be resumed")
    add("--eval-lengths", type=int, nargs="*", default=[2048, 4096, 8192, 16384])
    add("--eval-count", type=int, default=100, help="exercises of each kind and length")
    add("--step-tokens", type=int, default=65536)
    add("--longest", type=int, default=16384, help="longest training row")
    add("--source-mb", type=float, default=48.0)
    add("--workers", type=int, default=13)
    add("--layers", type=int, default=6)
    add("--hidden", type=int, default=384)
    add("--muon-lr", type=float, default=0.02)
    add("--adam-lr", type=float, default=0.003)
    add("--decay", type=float, default=0.1)
    add("--seed", type=int, default=1)
    add("--no-compile", action="store_true")
    return parser.parse_args()


def prepare_source(args: argparse.Namespace, work: Path) -> Path:
    """Tokenises the training source once; also writes which packages it came from."""
    path = work / "filler.npz"
    if path.is_file():
        return path
    start = time.perf_counter()
    packages = permissive_packages()
    used: dict[str, int] = {}

    def texts() -> Any:
        for name, text in iter_sources(packages, int(args.source_mb * 1e6), args.seed):
            used[name] = used.get(name, 0) + len(text)
            yield text

    filler = build_filler(Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")), texts())
    save_filler(filler, path)
    licences = {package.name: package.licence for package in packages}
    manifest = [
        {"package": n, "licence": licences[n], "characters": used[n]} for n in sorted(used, key=used.get)
    ]
    (work / "sources.json").write_text(json.dumps(manifest[::-1], indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    print(
        f"source: {sum(used.values()) / 1e6:.1f} MB of {len(used)} packages, "
        f"{len(filler.ids) / 1e6:.1f}M tokens, {len(filler.functions)} short functions, {seconds:.0f} s",
        flush=True,
    )
    return path


@dataclass
class Clock:
    """Training time so far, over all legs.

    Attributes:
        trained: seconds spent in steps.
        steps: steps done.
        tokens: tokens seen.
    """

    trained: float = 0.0
    steps: int = 0
    tokens: int = 0


class Trainer:
    """Model, optimizer, data and files of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work or args.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        self.filler = prepare_source(args, self.work)
        json_path = args.tokenizer / "tokenizer.json"
        self.clock = Clock()
        state: dict[str, Any] | None = None
        if args.resume:
            state = torch.load(args.resume / "checkpoint.pt", map_location="cpu", weights_only=True)
            self.clock = Clock(**state["clock"])
        # A resumed run must not see the first leg's rows again, hence the steps in the seed.
        self.feeder = Feeder(
            json_path,
            self.filler,
            args.workers,
            args.step_tokens,
            args.longest,
            args.seed + self.clock.steps,
            self.progress,
        )
        torch.manual_seed(args.seed)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        vocab = Tokenizer.from_file(str(json_path)).get_vocab_size()
        config = NanoConfig(layers=args.layers, hidden=args.hidden, vocab=vocab)
        self.model = Nano(config, compile_parts=cuda and not args.no_compile).to(self.device)
        self.model.backend, self.model.expand = pick_backend(config, args.step_tokens, args.longest)
        self.optimizer = NanoOptimizer(self.model, args.muon_lr, args.adam_lr, args.decay)
        self.code_weights = torch.tensor(CODE_WEIGHTS, device=self.device)
        self.log = (args.out / "log.jsonl").open("a", encoding="utf-8")
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            print(f"resumed at step {self.clock.steps}, {self.clock.trained:.0f} s", flush=True)

    @property
    def progress(self) -> float:
        """How much of the schedule is done, 0 to 1."""
        return min(1.0, self.clock.trained / (60 * self.args.minutes))

    def record(self, **values: Any) -> None:
        """Appends a line to the log."""
        self.log.write(json.dumps(values) + "\n")
        self.log.flush()

    def save(self) -> None:
        """Writes the checkpoint and the exported model."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clock": asdict(self.clock),
        }
        fresh = self.work / "checkpoint.new"
        torch.save(state, fresh)
        fresh.replace(self.work / "checkpoint.pt")
        export(self.model, self.args.out / "model", self.args.tokenizer)

    def step(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One step; returns loss and share of right answer tokens (on the device), and the row length."""
        batch = self.feeder.next()
        ids = torch.from_numpy(batch.ids).to(self.device, torch.int64)
        codes = torch.from_numpy(batch.codes).to(self.device, torch.int64)
        loss, right = self.model.loss(
            ids, self.code_weights[codes], self.dtype, compiled=not self.args.no_compile and ids.is_cuda
        )
        loss.backward()
        self.optimizer.step(learning_rate_scale(self.progress), self.clock.steps / WARM_STEPS)
        answered = (codes.roll(-1, 1) == ANSWERED).flatten()
        accuracy = (right & answered).sum() / answered.sum().clamp_min(1)
        return loss.detach(), accuracy, ids.size(1)

    def warm_up(self) -> None:
        """Compiles with a step of zero rate on zeroed gradients; its time does not count."""
        start = time.perf_counter()
        batch = self.feeder.next()
        ids = torch.from_numpy(batch.ids).to(self.device, torch.int64)
        for _ in range(2):
            loss, _ = self.model.loss(
                ids,
                torch.ones_like(ids, dtype=torch.float32),
                self.dtype,
                compiled=not self.args.no_compile and ids.is_cuda,
            )
            loss.backward()
            self.model.zero_grad(set_to_none=True)
        loss.item()
        print(f"warm-up: {time.perf_counter() - start:.1f} s", flush=True)

    def train(self) -> None:
        """Steps until the schedule or this leg ends."""
        self.warm_up()
        leg_end = self.clock.trained + 60 * (self.args.leg_minutes or 1e9)
        last, saved, printed = time.perf_counter(), time.perf_counter(), 0.0
        window: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        while self.progress < 1.0 and self.clock.trained < leg_end:
            window.append(self.step())
            self.clock.steps += 1
            self.clock.tokens += self.args.step_tokens
            if len(window) == 20:
                # The only synchronisation with the GPU: the clock is right only after it.
                losses = torch.stack([w[0] for w in window]).tolist()
                accuracies = torch.stack([w[1] for w in window]).tolist()
                now = time.perf_counter()
                self.clock.trained += now - last
                rate = 20 * self.args.step_tokens / (now - last)
                last = now
                self.feeder.progress.value = self.progress
                by_length: dict[int, list[float]] = {}
                for (_, _, length), accuracy in zip(window, accuracies, strict=True):
                    by_length.setdefault(length, []).append(accuracy)
                means = {str(n): round(sum(a) / len(a), 4) for n, a in sorted(by_length.items())}
                loss = sum(losses) / len(losses)
                self.record(
                    step=self.clock.steps,
                    seconds=round(self.clock.trained, 1),
                    loss=round(loss, 4),
                    answer_accuracy=means,
                    tokens_per_second=round(rate),
                )
                if loss != loss:
                    raise FloatingPointError("the loss is not a number")
                if self.clock.trained - printed > 8:
                    printed = self.clock.trained
                    print(
                        f"{self.clock.trained:6.1f} s  step {self.clock.steps}  loss {loss:.4f}  "
                        f"answers {means}  {rate / 1e6:.2f}M tok/s  queue {self.feeder.queue.qsize()}",
                        flush=True,
                    )
                window.clear()
                if now - saved > 60:
                    self.save()
                    saved = time.perf_counter()

    def run(self) -> None:
        """Trains, exports, scores and writes the card; a failure on the way still leaves what there is."""
        args = self.args
        try:
            self.train()
            self.save()
        except Exception:
            traceback.print_exc()
            if not self.clock.steps:
                raise
        finally:
            self.feeder.close()
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        facts = {
            "minutes": self.clock.trained / 60,
            "steps": self.clock.steps,
            "tokens": self.clock.tokens,
            "device": device,
            "torch": torch.__version__,
            "model": asdict(self.model.config),
            "step_tokens": args.step_tokens,
            "muon_lr": args.muon_lr,
            "adam_lr": args.adam_lr,
            "decay": args.decay,
            "finished": self.progress >= 1.0,
            "sources": json.loads((self.work / "sources.json").read_text(encoding="utf-8")),
        }
        start = time.perf_counter()
        scores = evaluate(
            self.model,
            args.tokenizer / "tokenizer.json",
            args.eval_lengths,
            args.eval_count,
            args.workers,
            self.dtype,
        )
        print(f"eval took {time.perf_counter() - start:.0f} s", flush=True)
        result = {"training": facts, "exact_match": scores}
        (args.out / "eval.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_card(args.out / "model", result)


if __name__ == "__main__":
    Trainer(parse_args()).run()
