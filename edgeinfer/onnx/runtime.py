"""ONNX Runtime as edgeinfer uses it: its options, and its errors in edgeinfer's words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnxruntime as ort

from edgeinfer.errors import EdgeInferError, EngineError, ModelFileError

#: What was loaded, which the message says already, and where in ONNX Runtime's own source that failed.
_NOISE = re.compile(r"^Load model from .*? failed: ?|/onnxruntime_src/\S+ [^()]*\([^()]*\) ")
_FATAL_ONLY = 4  # errors are raised, so they need no line on standard error


def session_options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    if threads is not None:  # otherwise as many as ONNX Runtime finds fit
        options.intra_op_num_threads = threads
    options.log_severity_level = _FATAL_ONLY
    return options


def make_session(
    model: bytes | str,
    options: ort.SessionOptions,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    **more: object,
) -> ort.InferenceSession:
    """A session, which is tried again with fewer providers only where there are several.

    ONNX Runtime says that it tries again on standard output, where results go. `more`: as InferenceSession
    takes it.
    """
    fallback = int(len(providers) > 1)
    return ort.InferenceSession(model, options, providers=list(providers), enable_fallback=fallback, **more)


@contextmanager
def explained(path: str | os.PathLike, kind: type[EdgeInferError] = EngineError) -> Iterator[None]:
    """What ONNX Runtime raises, as `kind`, with the model's path and without ONNX Runtime's prefixes."""
    try:
        yield
    except (ModelFileError, MemoryError):
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("onnxruntime", "builtins"):
            raise
        raise kind(f"ONNX Runtime refused {path}: {_words(error)}") from error


def _words(error: Exception) -> str:
    """ "[ONNXRuntimeError] : 1 : FAIL : Load model from x failed: why" -> "why"."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return _NOISE.sub("", text)[:1000]
