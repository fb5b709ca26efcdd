"""edgeinfer runs models that are larger than the memory they may use.

    import edgeinfer

    with edgeinfer.load("model.gguf", memory="2GiB") as model:
        for piece in model.generate("Once upon a time"):
            print(piece, end="", flush=True)
        print(model.stats.tokens_per_second)
"""

import os

from edgeinfer.errors import (
    BudgetError,
    EdgeInferError,
    EngineError,
    ExportError,
    InputError,
    ModelFileError,
    PromptError,
    ReadError,
    TraceError,
)
from edgeinfer.model import Model, Stats, load

__version__ = "0.1.0"

# ONNX Runtime reports its use to its makers and keeps an identifier in the user's cache folder, from the
# moment it is imported, unless this is set before. Nobody asked for that; who wants it sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "BudgetError",
    "EdgeInferError",
    "EngineError",
    "ExportError",
    "InputError",
    "Model",
    "ModelFileError",
    "PromptError",
    "ReadError",
    "Stats",
    "TraceError",
    "load",
]
