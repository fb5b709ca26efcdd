"""A GGUF model whose weights are brought in by the pager: loading without reading, the order of use, the binding.

Mechanism of llama.cpp that this rests on: model files are mapped, so every weight has an address at base + offset;
the graph callback sees every node, with its weights, before it is computed; the CPU reads a weight wherever its
`data` points. So the mapping is replaced by address space that cannot be touched, resident weights are read to their
own places in it, and the others point into the ring for the time of their use.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from edgeinfer import _native
from edgeinfer.engines.llama import LlamaContext, LlamaModel
from edgeinfer.engines.pools import describe_pools, gates_of, places_in_pools
from edgeinfer.errors import EngineError, ReadError
from edgeinfer.experts.trial import PredictionTrial
from edgeinfer.modelfile import ModelFile, TensorInfo
from edgeinfer.plan import Plan, WeightUse

log = logging.getLogger("edgeinfer")

# Tables that are looked up by the ids of a pass's tokens, which are known before it starts.
TOKEN_TABLES = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})

_RESIDENT, _STREAMED, _ROWS = 0, 1, 2
_FUNCTIONS = (
    "ggml_init ggml_free ggml_new_tensor_1d ggml_new_tensor_2d ggml_new_tensor_3d ggml_mul_mat_id ggml_get_rows "
    "ggml_view_1d ggml_reshape_1d ggml_permute ggml_transpose ggml_op_name ggml_set_name ggml_set_input "
    "ggml_tensor_overhead"
).split()
_IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
_one_load = threading.Lock()


def make_hook() -> _native.Hook:
    """The graph hook, after checking that the loaded llama.cpp lays out its tensors as the hook reads them."""
    library = llama_cpp.llama_cpp._lib
    try:
        addresses = {
            name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _FUNCTIONS
        }
        return _native.Hook(addresses)
    except (AttributeError, RuntimeError) as error:
        raise EngineError(
            f"This llama.cpp ({llama_cpp.__version__}) is not one that edgeinfer can stream weights through: {error}. "
            "Install llama-cpp-python 0.3.36 or a later 0.3."
        ) from error


@dataclass(frozen=True)
class _Seen:
    """A weight tensor of the loaded model, as recorded."""

    tensor: int
    home: int
    name: str
    rows: bool
    through_view: bool
    choice: int  # of experts, numbered from 1; 0: not multiplied by chosen experts


class PagedModel:
    """A llama.cpp model loaded without reading, and after `arm` the pager that feeds it.

    Life: construct, make a LlamaContext with `context_callbacks`, `record`, then `arm` with a plan. Every pass is
    `begin_pass(tokens)`, llama_decode, `end_pass`. Close the context before this.
    """

    def __init__(self, file: ModelFile):
        self.file = file
        self.hook = make_hook()
        self.pager: _native.Pager | None = None
        self._ring: _native.Arena | None = None
        self._row_blocks: list[tuple[int, int]] = []
        self._gates: tuple[list[tuple[int, int, int, int]], int] | None = None
        self._trial: PredictionTrial | None = None  # none: nothing is predicted
        self._token_started: float | None = None  # of a token that is decoded, for the trial
        self._logging = False
        self.model, self._bases = self._load()
        self.hook.set_ranges(self._ranges(file.tensors))

    def _load(self) -> tuple[LlamaModel, list[int]]:
        self._stats = parts = [path.stat() for path in self.file.paths]

        def load() -> LlamaModel:
            return LlamaModel(
                self.file.paths[0], load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP, use_extra_bufts=False
            )

        with _one_load:
            model, addresses = _native.load_without_reading(
                llama_cpp.llama_cpp._lib._name, [(part.st_dev, part.st_ino, part.st_size) for part in parts], load
            )
        if None in addresses:
            model.close()
            raise EngineError(
                "llama.cpp did not map the model file as expected, so its weights cannot be streamed. "
                "Give a larger --memory, so that the model fits."
            )
        return model, addresses

    @property
    def context_callbacks(self) -> dict[str, int]:
        hook = self.hook
        return {
            "cb_eval": hook.evaluate_address,
            "cb_data": hook.data_address,
            "abort": hook.abort_address,
            "abort_data": hook.data_address,
        }

    def record(self, context: LlamaContext) -> tuple[WeightUse, ...]:
        """The uses of weights in one pass, in order, from dry passes of one token and of a full batch.

        A dry pass asks about every node and stops before the second one is computed; the weights read as zeros.
        """
        from edgeinfer.engines.llama import DecodeAborted

        threads = llama_cpp.llama_n_threads(context.handle), llama_cpp.llama_n_threads_batch(context.handle)
        # On one thread: OpenMP counts the threads of every caller, and lets all of them sleep instead of spin between
        # two steps where they are more than the processors. Passes are computed on another thread than this one.
        llama_cpp.llama_set_n_threads(context.handle, 1, 1)
        self.hook.record(True)
        try:
            for count in (1, min(context.ubatch, context.context_length)):
                self.hook.begin_pass()
                try:
                    context.decode([0] * count)
                except DecodeAborted:
                    pass
                context.truncate(0)
        finally:
            self.hook.record(False)
            llama_cpp.llama_set_n_threads(context.handle, *threads)
        passes: dict[int, list[_Seen]] = {}
        names = {tensor.name for tensor in self.file.tensors}
        choices: dict[tuple[int, int], int] = {}
        for tensor, data, name, recording, _, rows, through_view, ids in self.hook.records():
            if name not in names:  # memory of llama.cpp's own: see _ranges
                continue
            choice = choices.setdefault((recording, ids), len(choices) + 1) if ids else 0
            passes.setdefault(recording, []).append(_Seen(tensor, data, name, rows, through_view, choice))
        if not passes:
            raise EngineError("llama.cpp's graph shows no weights of the model.")
        self._seen = [seen for uses in passes.values() for seen in uses]
        self.hook.set_ranges(self._ranges([self.file.tensor(seen.name) for seen in self._seen]))
        order = max(passes.values(), key=len)
        known = {seen.name for seen in order}
        order = order + [seen for seen in self._seen if seen.name not in known]
        return tuple(self._as_use(seen) for seen in order)

    def _as_use(self, seen: _Seen) -> WeightUse:
        info = self._info(seen)
        return WeightUse(
            info.name,
            info.nbytes,
            rows=seen.rows,
            through_view=seen.through_view,
            experts=info.shape[2] if seen.choice and len(info.shape) == 3 else 0,
            layer=info.layer,
            choice=seen.choice,
            router=info.role.startswith("ffn_gate_inp"),
        )

    def _info(self, seen: _Seen) -> TensorInfo:
        """The file's entry for a tensor; its address must be where the file says."""
        info = self.file.tensor(seen.name)
        if seen.home != self._bases[info.part] + info.offset:
            raise EngineError(f"llama.cpp placed weight {seen.name!r} where the file does not have it.")
        return info

    def arm(self, plan: Plan, uses: Sequence[WeightUse]) -> None:
        """Guard the address space, open what is resident, and start reading in the order of use."""
        known = {use.name for use in uses}
        rows = plan.rows - plan.resident  # a tied embedding that is resident needs no rows, and none dropped
        infos = {name: self.file.tensor(name) for name in known}
        self._guard(infos.values())
        blocks: list[tuple[int, int, int, int, int]] = []
        products: dict[str, int] = {}
        for name, info in infos.items():
            home = self._bases[info.part] + info.offset
            if name in rows:
                self._row_blocks.append((len(blocks), info.nbytes // info.shape[1]))
                blocks.append((info.part, _ROWS, info.offset, info.nbytes, home))
            if name in plan.resident or name in plan.streamed:
                kind = _RESIDENT if name in plan.resident else _STREAMED
                if kind == _RESIDENT:
                    _native.open_pages(home, info.nbytes)
                products[name] = len(blocks)
                blocks.append((info.part, kind, info.offset, info.nbytes, home))
        self._order = [
            products[use.name] for use in uses if use.name in products and not (use.rows and use.name in rows)
        ]
        self._ring = _native.Arena(plan.ring_bytes) if plan.ring_bytes else None
        self._check_files()
        self.pager = self._checked(
            _native.Pager,
            [(str(path), plan.direct) for path in self.file.paths],
            blocks,
            self._order,
            self._ring,
            plan.chunk_bytes,
            plan.reading_threads,
            describe_pools(self.file, plan.pools) if plan.pools else None,
        )
        self._check_files()
        pooled = places_in_pools(plan.pools) if plan.pools else {}
        weights = {
            seen.tensor: (
                seen.tensor,
                seen.home,
                products.get(seen.name, -1),
                seen.name in plan.streamed,
                seen.name in rows,
                *pooled.get(seen.name, ()),
            )
            for seen in self._seen
        }
        self.hook.bind(self.pager, list(weights.values()))
        if plan.pools and plan.pools.predict:
            resident = {name: self._bases[infos[name].part] + infos[name].offset for name in plan.resident}
            self._gates = gates_of(self.file, plan.pools, resident)

    def log_routing(self, on: bool) -> None:
        """Record what routers choose and what is predicted, of every token; see `hook.take_routing`."""
        self._logging = on
        self.hook.log_routing(on)

    def _check_files(self) -> None:
        """The pager notices changes of the files that it opened; they must be those that llama.cpp has loaded."""
        for path, then in zip(self.file.paths, self._stats):
            try:
                now = path.stat()
            except OSError:
                now = None
            if now is None or any(getattr(now, name) != getattr(then, name) for name in _IDENTITY):
                raise ReadError(
                    f"The model file changed, or was replaced or removed, while it was loaded: {path}. Load it again."
                )

    def _guard(self, infos: Iterable[TensorInfo]) -> None:
        """From now on a weight that is absent cannot be read: a mistake stops the process, never bends a result."""
        page = _native.PAGE_BYTES
        for start, end in self._ranges(infos):
            start, end = start // page * page, -(-end // page) * page
            _native.guard_pages(start, end - start)

    def _ranges(self, infos: Iterable[TensorInfo]) -> list[tuple[int, int]]:
        """The addresses from the first to the last of these weights, of each file that holds some.

        llama.cpp gives back what a mapping holds before the first weight that it uses and behind the last one, so
        other memory, the KV cache too, may come to lie there.
        """
        ranges: dict[int, tuple[int, int]] = {}
        for info in infos:
            start, end = ranges.get(info.part, (info.offset, 0))
            ranges[info.part] = min(start, info.offset), max(end, info.offset + info.nbytes)
        return [(self._bases[part] + start, self._bases[part] + end) for part, (start, end) in ranges.items()]

    def begin_pass(self, tokens: Sequence[int]) -> None:
        """Before llama_decode of `tokens`: check the files, bring in the rows that the tokens look up."""
        self._checked(self.pager.begin_pass)
        self.hook.begin_pass()
        for block, row_bytes in self._row_blocks:
            self._checked(self.pager.open_rows, block, row_bytes, array("i", tokens))
        self._token_started = None
        if self._trial is not None and len(tokens) == 1:
            self.hook.predict(self._trial.predicting)
            self._token_started = time.perf_counter()

    def end_pass(self) -> None:
        """After llama_decode, however it ended. Raises ReadError when what was computed may be wrong."""
        self.hook.end_pass()
        for block, _ in self._row_blocks:
            self.pager.close_rows(block)
        self._checked(self.pager.end_pass)
        if self.hook.halted:
            return
        if self._token_started is not None:
            self._trial.record(time.perf_counter() - self._token_started)
        if self._gates:  # the routers are in memory now: the first pass has brought them in
            self.hook.set_gates(*self._gates)
            self._gates, self._trial = None, None if self._logging else PredictionTrial()

    @property
    def too_many_experts(self) -> bool:
        """Whether the last pass ended because its tokens want more experts of one layer than the cache holds."""
        return self.hook.too_many_experts

    def expert_statistics(self) -> dict:
        return self.pager.expert_statistics()

    def _checked(self, call: Callable, *arguments: object) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno == errno.ECANCELED:
                raise
            raise ReadError(_explain(error)) from error

    def read_pass(self) -> int:
        """Read what one pass streams and compute nothing: how fast the disk alone would be. Gives the bytes."""
        before = self.pager.statistics()["read_bytes"]
        self._checked(self.pager.begin_pass)
        for block in self._order:
            self._checked(self.pager.acquire, block)
            self.pager.release()
        self._checked(self.pager.end_pass)
        return self.pager.statistics()["read_bytes"] - before

    def pass_fraction(self) -> float:
        """How much of the current pass's order of use is done, 0 to 1. From any thread."""
        return self.pager.statistics()["pass_fraction"]

    def statistics(self) -> dict:
        return self.pager.statistics()

    def abort(self) -> None:
        """From any thread: end the pass that is being computed."""
        if self.pager is not None:
            self.pager.abort()

    def close(self) -> None:
        self.hook.unbind()
        pager, self.pager = self.pager, None
        if pager is not None:
            pager.close()
        self._ring = None
        self.model.close()


def _explain(error: OSError) -> str:
    advice = {
        errno.ESTALE: "The answer was stopped. Leave the file alone while it runs, and load the model again.",
        errno.ENODATA: "The answer was stopped. Restore the file and load the model again.",
        errno.EIO: "The disk could not read it. Check the disk, copy the model elsewhere and load it again.",
    }
    return f"The model file could not be used any more: {error.strerror}. " + advice.get(
        error.errno, "The answer was stopped; load the model again."
    )
