"""Train edgeinfer's story models and export them as GGUF: the dense embedded default and one with experts.

    pip install 'edgeinfer[train]'
    python models/train/train_story.py --data DATA --work WORK
    python models/train/train_story.py --data DATA --work WORK --model story-moe --dense WORK/story.pt

DATA holds `text/tinystories-1.txt`, `text/tinystories-2.txt` and `text/books/*.md`. WORK keeps the tokenizer,
the token streams and a checkpoint a model: run the same command again to go on after an interruption.
The learning rate is flat, then falls to zero over the last --decay-steps; `touch WORK/decay` starts it.
A finished run with a larger --steps goes on: the rate rises again and falls at the new end (WSD-S,
arXiv:2410.05192). `--export-only` writes the GGUF from the latest checkpoint.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch.nn import functional as F

from corpus import read_corpus
from data import Windows, encode, train_tokenizer
from export import TYPES, write_gguf
from model import CONFIGS, Config, Model
from upcycle import start_from_dense

HERE = Path(__file__).resolve().parent
WARM_UP_STEPS = 100
MATRIX_RATE, OTHER_RATE = 4e-3, 3e-3  # Muon for the layers' matrices, AdamW for embedding and norms
STORIES_SHARE, STORIES_SHARE_DECAY = 0.35, 0.75  # of the windows; the rest are books
IGNORED = -100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_data = os.environ.get("EDGEINFER_TEST_DATA")

    def option(name: str, help: str, **kwargs: object) -> None:
        default = " (default: %(default)s)" if kwargs.get("default") is not None else ""
        parser.add_argument(name, help=help + default, **kwargs)

    option("--data", "folder that holds text/; $EDGEINFER_TEST_DATA if set",
           type=Path, default=default_data, required=default_data is None)
    option("--work", "folder for tokenizer, tokens and checkpoint", type=Path, default=HERE / "cache")
    option("--model", "which model", choices=sorted(CONFIGS), default="story")
    option("--output", "GGUF to write (default: MODEL.gguf beside this folder)", type=Path)
    option("--type", "type of the matrices in the GGUF", choices=sorted(TYPES), default="Q8_0")
    option("--dense", "checkpoint of the dense model from which a model with experts starts", type=Path)
    option("--steps", "optimizer steps in all", type=int, default=3600)
    option("--decay-steps", "steps of the final decay", type=int, default=1000)
    option("--batch", "windows of 512 tokens a step", type=int, default=8)
    option("--dropout", "share of the layers' outputs that is dropped", type=float, default=0.1)
    option("--seed", "of weights, order and dropout", type=int, default=1)
    option("--threads", "computing threads", type=int, default=2)
    option("--compile", "use torch.compile: faster steps, a minute to start", action="store_true")
    option("--export-only", "write the GGUF from the checkpoint, train nothing", action="store_true")
    arguments = parser.parse_args()
    if arguments.dense and not CONFIGS[arguments.model].num_experts:
        parser.error(f"--dense is for a model with experts; {arguments.model} has none: name another --model")
    arguments.output = arguments.output or HERE.parent / f"{arguments.model}.gguf"
    return arguments


@dataclass
class Tokens:
    """The tokenizer and the three token streams."""

    tokenizer: sentencepiece.SentencePieceProcessor
    stories: np.ndarray
    books: np.ndarray
    held_out: list[list[int]]  # one story each: BOS, text, EOS


def load_tokens(text_folder: Path, work: Path, vocab_size: int) -> Tokens:
    """Train the tokenizer and encode the texts, or take both from `work`."""
    tokenizer_path, cache = work / "tokenizer.model", work / "tokens.npz"
    if not cache.exists():
        corpus = read_corpus(text_folder)
        train_tokenizer(corpus, vocab_size, tokenizer_path)
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
        partial = work / "tokens.partial.npz"
        np.savez(partial, stories=encode(tokenizer, corpus.stories), books=encode(tokenizer, corpus.books),
                 held_out=encode(tokenizer, corpus.held_out))
        partial.replace(cache)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    with np.load(cache) as arrays:
        stream = arrays["held_out"]
        starts = np.flatnonzero(stream == tokenizer.bos_id())
        held_out = [part.tolist() for part in np.split(stream, starts[1:])]
        return Tokens(tokenizer, arrays["stories"], arrays["books"], held_out)


@torch.no_grad()
def held_out_loss(model: Model, stories: list[list[int]], batch: int = 11) -> float:
    """Mean loss in nats a token: every story alone, from BOS to EOS, cut at the context length."""
    model.eval()
    length = model.config.context_length
    total, count = 0.0, 0
    for first in range(0, len(stories), batch):
        group = [story[:length + 1] for story in stories[first:first + batch]]
        ids = torch.zeros(len(group), max(map(len, group)) - 1, dtype=torch.long)
        targets = torch.full_like(ids, IGNORED)
        for row, story in enumerate(group):
            ids[row, :len(story) - 1] = torch.tensor(story[:-1])
            targets[row, :len(story) - 1] = torch.tensor(story[1:])
        logits = model(ids).flatten(0, 1)
        total += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    model.train()
    return total / count


class Trainer:
    """Model, optimizers, data position and schedule; everything a checkpoint holds."""

    def __init__(self, arguments: argparse.Namespace, tokens: Tokens, config: Config):
        torch.manual_seed(arguments.seed)
        self.arguments, self.tokens = arguments, tokens
        self.model = Model(config, arguments.dropout)
        is_matrix = {p: p.ndim == 2 and n.startswith("layers") for n, p in self.model.named_parameters()}
        matrices = [parameter for parameter in is_matrix if is_matrix[parameter]]
        others = [parameter for parameter in is_matrix if not is_matrix[parameter]]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.stories = Windows(tokens.stories, config.context_length, arguments.seed)
        self.books = Windows(tokens.books, config.context_length, arguments.seed)
        self.step = 0
        self.decay_start = arguments.steps - arguments.decay_steps
        self.checkpoint = arguments.work / f"{arguments.model}.pt"

    @property
    def last_step(self) -> int:
        return self.decay_start + self.arguments.decay_steps

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                    "windows": (self.stories.taken, self.books.taken), "step": self.step,
                    "decay_start": self.decay_start, "decayed": self.step == self.last_step}, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(optimizer_state)
        self.stories.taken, self.books.taken = state["windows"]
        self.step = state["step"]
        if not state["decayed"]:
            self.decay_start = min(self.decay_start, state["decay_start"])
        return True

    def set_rates(self) -> None:
        """Linear warm-up, flat, linear fall to zero."""
        left = self.last_step - self.step
        scale = min(1.0, (self.step + 1) / WARM_UP_STEPS, left / self.arguments.decay_steps)
        for optimizer, rate in zip(self.optimizers, (MATRIX_RATE, OTHER_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (batch, context), for the current step."""
        share = STORIES_SHARE_DECAY if self.step >= self.decay_start else STORIES_SHARE
        draws = np.random.default_rng((self.arguments.seed, self.step)).random(self.arguments.batch)
        windows = np.stack([(self.stories if draw < share else self.books).take() for draw in draws])
        ids = torch.from_numpy(windows.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run(self) -> None:
        """Train to the last step; a checkpoint every 50 steps, the held-out loss every 200."""
        loss_of = torch.compile(self.model.loss) if self.arguments.compile else self.model.loss
        self.model.train()
        started, first_step, recent = time.monotonic(), self.step, []
        while self.step < self.last_step:
            if self.step < self.decay_start and (self.arguments.work / "decay").exists():
                self.decay_start = self.step
                print(f"step {self.step}: final decay starts", flush=True)
            # The same dropout after a restart.
            torch.manual_seed(self.arguments.seed * 1_000_003 + self.step)
            self.set_rates()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(*self.batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            self.step += 1
            if self.step % 20 == 0:
                self.report(recent, started, first_step)
                recent = []
            if self.step % 200 == 0 or self.step == self.last_step:
                loss_now = held_out_loss(self.model, self.tokens.held_out)
                print(f"step {self.step}: held-out loss {loss_now:.4f}", flush=True)
            if self.step % 50 == 0 or self.step == self.last_step:
                self.save()

    def report(self, recent: list[float], started: float, first_step: int) -> None:
        elapsed, done = time.monotonic() - started, self.step - first_step
        tokens_per_second = done * self.arguments.batch * self.model.config.context_length / elapsed
        minutes_left = (self.last_step - self.step) * elapsed / done / 60
        print(f"step {self.step}/{self.last_step}: loss {sum(recent) / len(recent):.3f}, "
              f"stories {self.stories.epochs:.1f} x, books {self.books.epochs:.1f} x, "
              f"{tokens_per_second:.0f} tokens/s, {minutes_left:.0f} min left", flush=True)


def main() -> int:
    arguments = parse_arguments()
    text_folder = arguments.data / "text"
    if not text_folder.is_dir():
        print(f"error: expected the texts in {text_folder}, found no such folder; name its parent: --data",
              file=sys.stderr)
        return 2
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    config = CONFIGS[arguments.model]
    tokens = load_tokens(text_folder, arguments.work, config.vocab_size)
    print(f"{len(tokens.stories)} story tokens, {len(tokens.books)} book tokens, "
          f"{sum(map(len, tokens.held_out))} held-out tokens", flush=True)
    trainer = Trainer(arguments, tokens, config)
    resumed = trainer.resume()
    if arguments.dense and not resumed:
        start_from_dense(trainer.model, torch.load(arguments.dense, weights_only=True)["model"])
        print(f"starts from {arguments.dense}: held-out loss "
              f"{held_out_loss(trainer.model, tokens.held_out):.4f}", flush=True)
    if arguments.export_only and not resumed:
        print(f"error: expected a checkpoint at {trainer.checkpoint}, found none; train first",
              file=sys.stderr)
        return 2
    print(f"{trainer.model.num_parameters()} parameters, step {trainer.step} of {trainer.last_step}",
          flush=True)
    if not arguments.export_only:
        trainer.run()
    loss = held_out_loss(trainer.model, tokens.held_out)
    write_gguf(trainer.model, tokens.tokenizer, arguments.output, arguments.model, arguments.type)
    print(f"held-out loss {loss:.4f} (perplexity {math.exp(loss):.2f}); wrote {arguments.output}, "
          f"{arguments.output.stat().st_size} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
