"""edgeinfer runs models that are larger than the memory they may use.

    import edgeinfer

    with edgeinfer.load("model.gguf", memory="2GiB") as model:
        for piece in model.generate("Once upon a time"):
            print(piece, end="", flush=True)
        print(model.stats.tokens_per_second)
"""

from edgeinfer.errors import (
    BudgetError,
    EdgeInferError,
    EngineError,
    ModelFileError,
    PromptError,
    ReadError,
)
from edgeinfer.model import Model, Stats, load

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "EdgeInferError",
    "EngineError",
    "Model",
    "ModelFileError",
    "PromptError",
    "ReadError",
    "Stats",
    "load",
]
