"""Engines for tests of what stands above an engine: stock llama.cpp, and a scripted one."""

import time
from types import SimpleNamespace

import llama_cpp

from edgeinfer.engines.llama import LlamaContext, LlamaModel, Sampler


def statistics(**values):
    names = "load_seconds resident_bytes streamed_bytes wait_seconds disk_bytes_per_second passes"
    defaults = {**dict.fromkeys(names.split(), 0), "budget_bytes": 1 << 30, "experts": None, "peak_memory_bytes": 1 << 20}
    return SimpleNamespace(**{**defaults, **values})


class StockEngine:
    """All in memory, without a budget."""

    mode = "in-memory"

    def __init__(self, path, context_length=512):
        self.model = LlamaModel(path, load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP, use_extra_bufts=False)
        self.context = LlamaContext(
            self.model, context_length=context_length, threads=1, flash_attention=False
        )
        self.context_length = context_length
        self.prefilled = []  # the length of each prefill

    @property
    def position(self):
        return self.context.position

    def prefill(self, tokens, progress=None):
        self.prefilled.append(len(tokens))
        self.decode(tokens)
        if progress:
            progress(len(tokens), len(tokens), 0.0)

    def decode(self, tokens):
        self.context.decode(tokens)

    def make_sampler(self, *options):
        return Sampler(*options, self.model)

    def sample(self, sampler):
        return sampler.sample(self.context)

    def truncate(self, length):
        return self.context.truncate(length)

    def statistics(self):
        return statistics()

    def close(self):
        self.context.close()
        self.model.close()


class ScriptedEngine:
    """Samples the given tokens, each a piece of bytes; None ends the text. Reads 10 bytes a decode."""

    mode = "streaming"

    def __init__(self, pieces, context_length=100, wait=0.0):
        self._pieces = pieces
        self._wait = wait
        self._next = 0
        self._streamed = 0
        self.context_length = context_length
        self.context = SimpleNamespace(ubatch=4)
        self.position = 0
        self.model = SimpleNamespace(
            train_context=1000,
            is_end=lambda token: pieces[token] is None,
            token_bytes=lambda token: pieces[token],
        )

    def prefill(self, tokens, progress=None):
        for done in range(0, len(tokens), 4):
            if progress:
                progress(done, len(tokens), 0.5)
        self.position += len(tokens)
        self._streamed += 1000

    def decode(self, tokens):
        self.position += len(tokens)
        self._streamed += 10
        time.sleep(self._wait)

    def make_sampler(self, *options):
        return Sampler(*options, self.model)

    def sample(self, _sampler):
        self._next += 1
        return self._next - 1

    def statistics(self):
        return statistics(streamed_bytes=self._streamed)
