"""Errors that a user can cause or meet. Each message says what was expected, what was found and what to do next."""


class EdgeInferError(Exception):
    """Base of every error that edgeinfer raises on purpose."""


class ModelFileError(EdgeInferError):
    """The model file is missing, malformed, incomplete or of a kind that cannot be run."""


class BudgetError(EdgeInferError):
    """The memory budget cannot be read or cannot hold the model's smallest working set.

    `smallest_bytes` is the smallest budget that works, where it is known.
    """

    def __init__(self, message: str, smallest_bytes: int | None = None):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class PromptError(EdgeInferError):
    """The prompt cannot be used, for example because it is longer than the context."""


class InputError(EdgeInferError):
    """What was given to a model's inputs does not fit them: a wrong name, type or shape."""


class ReadError(EdgeInferError):
    """The model file could not be read while running: the disk failed, or the file was changed."""


class EngineError(EdgeInferError):
    """llama.cpp or ONNX Runtime refused, or is not the version that edgeinfer knows."""


class TraceError(EdgeInferError):
    """A trace of expert routing is malformed, incomplete, or of another model."""


class ExportError(EdgeInferError):
    """A checkpoint or model cannot be exported, quantized or laid out anew, or the result cannot be written."""
