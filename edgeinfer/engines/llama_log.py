"""llama.cpp's log: kept from the screen, and asked for the reason when something fails."""

from __future__ import annotations

import os
import re
import threading
from collections import deque

import llama_cpp

from edgeinfer.errors import EdgeInferError, EngineError, ModelFileError

_LOG_LEVEL_ERROR = 4  # enum ggml_log_level
_LAST_LINE = "; llama_model_load_from_file_impl: failed to load model"
_UNKNOWN_ARCHITECTURE = re.compile(r"unknown model architecture: ('[^;]*')")

_errors: deque[str] = deque(maxlen=5)
_log: deque[str] = deque(maxlen=100)
_start_lock = threading.Lock()
_started = False


@llama_cpp.llama_log_callback
def _keep_log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if not line:
        return
    _log.append(line)
    if level == _LOG_LEVEL_ERROR:
        _errors.append(line)


def start() -> None:
    """Initialise the library once per process and keep its log from the screen."""
    global _started
    with _start_lock:
        llama_cpp.llama_log_set(_keep_log, None)
        if not _started:
            llama_cpp.llama_backend_init()
            _started = True


def recent_log() -> list[str]:
    """The last lines that llama.cpp logged, oldest first (100 at most)."""
    return list(_log)


def forget_errors() -> None:
    """What is called next is the only one that `error_reason` speaks of."""
    _errors.clear()


def error_reason() -> str:
    """The last errors that llama.cpp logged, in its own words."""
    return "; ".join(_errors) or "it gave no reason"


def load_error(path: str | os.PathLike) -> EdgeInferError:
    """What llama.cpp said while it could not load a model, and what can be done about it."""
    version = f"llama-cpp-python {llama_cpp.__version__}"
    reason = error_reason()
    if match := _UNKNOWN_ARCHITECTURE.search(reason):
        return ModelFileError(
            f"{path}: its architecture {match[1]} is not one that llama.cpp knows ({version} is installed). "
            "Give another model, or install a newer edgeinfer and llama-cpp-python."
        )
    reason = reason.removesuffix(_LAST_LINE).replace("llama_model_load: error loading model: ", "")
    return EngineError(
        f"llama.cpp could not load {path}: {reason}. If the file is whole, it may need another llama.cpp than "
        f"that of {version}: convert it again, or give another model."
    )
