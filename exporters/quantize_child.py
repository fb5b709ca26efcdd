"""The child process in which llama.cpp quantizes: `python -m edgeinfer.exporters.quantize_child`.

llama.cpp may end its process (GGML_ASSERT), holds the GIL of no one and cannot be interrupted; here that ends
this child only. Standard input holds one line of JSON (see `Request`), then the importance as raw float32,
and stays open for as long as the parent lives. Standard error is llama.cpp's log. Exit code 0: done; 1: the
log says why not.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

DRY_RUN_DONE = "edgeinfer: dry run done"
_INT, _STR = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
_MAX_STRING_BYTES = 127  # of llama_model_kv_override


@dataclass
class Request:
    """What to do. `types`: tensor -> number of a ggml type; `importance`: (tensor, how many floats follow)."""

    source: str
    target: str
    ftype: int
    threads: int
    buffer_bytes: int
    requantize: bool
    only_dry: bool
    types: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, int | str] = field(default_factory=dict)
    importance: list[tuple[str, int]] = field(default_factory=list)


@llama_cpp.llama_log_callback
def _log(_level: int, text: bytes, _data: object) -> None:
    os.write(2, text)


def _parameters(request: Request, floats: list[np.ndarray]) -> tuple[object, list[object]]:
    """llama_model_quantize_params for `request`, and what has to stay alive with them."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = request.threads
    params.ftype = request.ftype
    params.allow_requantize = request.requantize
    params.max_buf_size = request.buffer_bytes
    overrides = (llama_cpp.llama_model_tensor_override * (len(request.types) + 1))()
    for entry, (name, number) in zip(overrides, request.types.items()):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), number
    params.tt_overrides = overrides
    values = (llama_cpp.llama_model_kv_override * (len(request.metadata) + 1))()
    for entry, (key, value) in zip(values, request.metadata.items()):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = _INT, value
        else:
            text = value.encode("utf-8", "replace")[:_MAX_STRING_BYTES].decode("utf-8", "ignore")
            entry.tag, entry.value.val_str = _STR, text.encode()
    params.kv_overrides = values
    matrices = (llama_cpp.llama_model_imatrix_data * (len(floats) + 1))()
    for entry, (name, count), data in zip(matrices, request.importance, floats):
        entry.name, entry.size = name.encode(), count
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if floats:
        params.imatrix = matrices
    return params, [overrides, values, matrices]


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it ends."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    stream = sys.stdin.buffer
    request = Request(**json.loads(stream.readline()))
    floats = [np.frombuffer(stream.read(4 * count), dtype=np.float32) for _, count in request.importance]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    llama_cpp.llama_log_set(_log, None)
    params, kept = _parameters(request, floats)
    for dry in (True,) if request.only_dry else (True, False):
        params.dry_run = dry
        source, target = os.fsencode(request.source), os.fsencode(request.target)
        if llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)) != 0:
            return 1
        if dry:
            os.write(2, f"\n{DRY_RUN_DONE}\n".encode())
    del kept
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # the thread above reads for ever
