"""PyTorch modules and encoders of transformers as ONNX, by torch.onnx. The weights are in memory while this
runs.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgeinfer.errors import ExportError
from edgeinfer.exporters.checkpoint import read_checkpoint

_OPSET = 18  # what torch.onnx writes without converting
_BATCH, _TOKENS = 2, 11  # of the example: 1 would be taken for a fixed size


@dataclass(frozen=True)
class Traced:
    """What torch.onnx needs beside the module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: Any
    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None


def export_module(module: Any, example_inputs: Any, target: Path) -> None:
    """Write a torch.nn.Module in evaluation mode to `target`.

    `example_inputs`: a tensor, a tuple of positional or a dict of named arguments. The first axis of every
    tensor may vary in the result where the module allows it and the example has 2 or more there. Raises
    ExportError.
    """
    torch = _torch()
    if example_inputs is None:
        raise ExportError(
            "A PyTorch module needs example_inputs: a tensor, or a tuple or dict of them, as its forward "
            "takes them."
        )
    named = isinstance(example_inputs, Mapping)
    args = () if named else example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_inputs) if named else {}

    def axes(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.ndim else None

    dynamic = torch.utils._pytree.tree_map(axes, kwargs if named else args)
    _trace(module, Traced(args, kwargs, dynamic), target)
    _name_batch(target)


def _name_batch(path: Path) -> None:
    """Call the size of all inputs' first axis "batch", where it is one that varies; torch.export makes up a
    name.
    """
    model = onnx.load(str(path), load_external_data=False)
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.input]
    firsts = {dims[0].dim_param for dims in shapes if dims} - {""}
    if len(firsts) != 1:
        return
    word = re.compile(rf"\b{re.escape(firsts.pop())}\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = word.sub("batch", dim.dim_param)
    path.write_bytes(model.SerializeToString())


def export_encoder(folder: Path, target: Path) -> str:
    """Write the encoder in the checkpoint `folder` (BERT and its kind, or one for images) to `target`; its
    class.

    Batch and sequence length may vary. Raises ExportError: not an encoder, weights that are missing.
    """
    torch = _torch()
    module = _load(folder, torch)
    traced = (
        _images(module, torch) if module.main_input_name == "pixel_values" else _texts(module, folder, torch)
    )
    with torch.inference_mode():
        found = module(**traced.kwargs)
    names = list(found.keys()) if all(isinstance(value, torch.Tensor) for value in found.values()) else None
    _trace(module, Traced((), traced.kwargs, traced.dynamic, traced.inputs, names), target)
    return type(module).__name__


def _torch() -> Any:
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f'Exporting from PyTorch needs {error.name}: pip install "edgeinfer[export]"'
        ) from error
    return torch


def _load(folder: Path, torch: Any) -> Any:
    import transformers

    config = read_checkpoint(folder).config
    name = next(iter(config.get("architectures") or ()), "")
    found = getattr(transformers, str(name), None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    with _quiet():
        try:
            module, info = (found if known else transformers.AutoModel).from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # transformers raises errors of many kinds for what a folder may hold
            raise ExportError(f"transformers cannot open {folder}: {_words(error)}") from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ExportError(
            f"{folder}: has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, "
            f"which {type(module).__name__} needs. The checkpoint is incomplete, or of another class than "
            "config.json says."
        )
    if module.config.is_encoder_decoder:
        raise ExportError(
            f"{folder}: {type(module).__name__} has an encoder and a decoder, which is not exported as a "
            "whole. Export its encoder as a PyTorch module: export_onnx(model.get_encoder(), ..., "
            "example_inputs=...)."
        )
    return module.eval()


def _texts(module: Any, folder: Path, torch: Any) -> Traced:
    if module.main_input_name != "input_ids":
        raise ExportError(
            f"{folder}: {type(module).__name__} takes {module.main_input_name}. Expected an encoder of text "
            "or images; export this one as a PyTorch module, with example_inputs."
        )
    takes = inspect.signature(module.forward).parameters
    ids = torch.randint(
        0, module.config.vocab_size, (_BATCH, _TOKENS), generator=torch.Generator().manual_seed(0)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in takes and getattr(module.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    return Traced((), inputs, {name: {0: batch, 1: sequence} for name in inputs}, list(inputs))


def _images(module: Any, torch: Any) -> Traced:
    size = module.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(_BATCH, getattr(module.config, "num_channels", 3), height, width)
    return Traced(
        (), {"pixel_values": pixels}, {"pixel_values": {0: torch.export.Dim("batch")}}, ["pixel_values"]
    )


def _trace(module: Any, traced: Traced, target: Path) -> None:
    torch = _torch()
    training = module.training
    with _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                traced.args,
                kwargs=traced.kwargs,
                dynamo=True,
                dynamic_shapes=traced.dynamic,
                input_names=traced.inputs,
                output_names=traced.outputs,
                opset_version=_OPSET,
                verbose=False,
            )
            program.save(str(target), external_data=True)
        except (MemoryError, KeyboardInterrupt, OSError):
            raise
        except Exception as error:  # what torch.onnx raises is not of one kind
            cause = error.__cause__ or error
            raise ExportError(f"torch.onnx cannot export {type(module).__name__}: {_words(cause)}") from error
        finally:
            module.train(training)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, warnings and notes of the libraries."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)  # torch.export logs as errors what it works around
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
