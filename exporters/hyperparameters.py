"""What config.json says, completed and checked by an architecture's mapping, as GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeinfer.errors import ExportError
from edgeinfer.exporters.expressions import count, evaluate
from edgeinfer.exporters.mapping import ArchitectureMapping
from edgeinfer.exporters.rope import Rope

_SLIDING = "sliding_attention"
_LARGEST_FLOAT32 = 3.4e38


def complete_config(mapping: ArchitectureMapping, config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of `config`, with the defaults of transformers where it says nothing.

    Raises ExportError for what llama.cpp cannot compute, and for checkpoints that are quantized already.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ExportError(
            f"config.json: the checkpoint is quantized already ({str(method)[:40]}). Export the original, "
            "and choose a type with --quant."
        )
    values = dict(config)
    if mapping.text_config and isinstance(config.get("text_config"), dict):
        values |= config["text_config"]
    for key, default in mapping.defaults.items():
        derived = isinstance(default, str) and default.startswith("=")
        if derived and values.get(key) is None:
            values[key] = evaluate(default[1:], values)
        elif not derived:
            values.setdefault(key, default)
    for rule in mapping.require:
        _check(rule, values)
    return values


def _check(rule: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    layers = values.get("num_hidden_layers")
    if ("layers" in rule and layers != rule["layers"]) or (
        "other_layers" in rule and layers == rule["other_layers"]
    ):
        return
    if "key" in rule:
        found = values.get(rule["key"])
        if any(type(found) is type(value) and found == value for value in rule["values"]):
            return
        expected = " or ".join(repr(value) for value in rule["values"])
        message = f"{rule['key']} is {str(found)[:60]!r}, expected {expected}"
    elif "at_most" in rule:
        fewer, more = (count(side, values) for side in rule["at_most"])
        if fewer <= more:
            return
        message = f"{rule['at_most'][0]} is {fewer}, expected at most {rule['at_most'][1]}, which is {more}"
    else:
        left, right = (evaluate(side, values) for side in rule["equal"])
        if left == right:
            return
        message = f"{rule['equal'][0]} is {left}, expected {rule['equal'][1]}, which is {right}"
    raise ExportError(f"config.json: {message}: {rule['why']}.")


def gguf_metadata(mapping: ArchitectureMapping, values: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    """Full GGUF keys of the hyperparameters; int stands for uint32, float for float32, list for an array."""
    metadata: dict[str, Any] = {}
    for key, rule in mapping.metadata.items():
        value = _value(rule, values)
        if value is not None:
            metadata[key] = value
    return {f"{mapping.gguf}.{key}": value for key, value in {**metadata, **rope.metadata}.items()}


def _value(rule: Any, values: Mapping[str, Any]) -> Any:
    if not isinstance(rule, dict):
        return count(rule, values)
    if "sliding_layers" in rule:
        return sliding_layers(values, rule["sliding_layers"])
    found = evaluate(rule["float"], values)
    if found is None and "null" in rule:
        return rule["null"]
    if type(found) not in (int, float) or not abs(found) < _LARGEST_FLOAT32:
        raise ExportError(f"config.json: {rule['float']!r} must be a number, found {str(found)[:60]!r}.")
    return float(found)


def sliding_layers(values: Mapping[str, Any], pattern: str | int) -> list[bool]:
    """For each layer whether its attention slides: by layer_types, else every layer but each `pattern`th."""
    layers = count("num_hidden_layers", values)
    types = values.get("layer_types")
    if types is None:
        period = count(pattern, values)
        return [bool((layer + 1) % period) for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise ExportError(f"config.json: layer_types must name the type of each of {layers} layers.")
    unknown = {str(kind) for kind in types} - {_SLIDING, "full_attention"}
    if unknown:
        raise ExportError(
            f"config.json: layer_types has {', '.join(sorted(unknown))[:80]}, expected {_SLIDING} and "
            "full_attention."
        )
    return [kind == _SLIDING for kind in types]


def unseen_window(mapping: ArchitectureMapping, values: Mapping[str, Any]) -> int | None:
    """Tokens of a sliding window that the model has and llama.cpp, in this architecture, has not."""
    window, context = values.get("sliding_window"), count("max_position_embeddings", values)
    types = values.get("layer_types")
    slides = values.get("use_sliding_window", True) and (not isinstance(types, list) or _SLIDING in types)
    if not mapping.full_attention or not slides or type(window) is not int or not 0 < window < context:
        return None
    return window


def window_notes(mapping: ArchitectureMapping, values: Mapping[str, Any]) -> list[str]:
    """What `unseen_window` means."""
    window = unseen_window(mapping, values)
    if window is None:
        return []
    return [
        f"the model attends to the last {window:,} tokens, llama.cpp to all of them in this architecture: "
        f"the results are the original's up to {window:,} tokens"
    ]
