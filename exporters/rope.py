"""Rotary positions: from a config's rope_theta, rope_scaling or rope_parameters to llama.cpp's.

The formulas are transformers' (modeling_rope_utils.py); the GGUF keys and tensors are those that llama.cpp
reads (llama_model_base::load_hparams, llama_context, models/llama.cpp, models/phi3.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeinfer.errors import ExportError
from edgeinfer.exporters.expressions import count

TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_SMALLEST, _LARGEST = 1e-30, 1e30  # what is computed from such numbers fits into float32 too
_DEFAULT_BETA = {"beta_fast": 32.0, "beta_slow": 1.0}  # what llama.cpp computes with


@dataclass(frozen=True)
class RopeRules:
    """What a mapping file says about an architecture's rope.

    `types`: the scalings that llama.cpp has for it; `theta` and `local_theta`: what transformers takes where
    the config says nothing (`local_theta` only where sliding layers have a base of their own); `partial`:
    whether a part of a head may be rotated; `aliases`: other names of types.
    """

    types: tuple[str, ...]
    theta: float = 10000.0
    local_theta: float | None = None
    partial: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = {*self.types, *self.aliases.values()} - set(TYPES)
        if unknown:
            raise ValueError(f"rope types {sorted(unknown)} are unknown, expected {', '.join(TYPES)}")


@dataclass
class Rope:
    """GGUF keys (without the architecture's prefix), tensors (float32, half a head), and notes."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_rope(config: Mapping[str, Any], rules: RopeRules) -> Rope:
    """The rope of a complete config (with head_dim and max_position_embeddings).

    Raises ExportError for a scaling that llama.cpp does not have for this architecture.
    """
    main, local = _parameters(config, rules)
    rope = Rope()
    dimension = _dimension(config, main, rules)
    rope.metadata["rope.dimension_count"] = dimension
    rope.metadata["rope.freq_base"] = _number(main, "rope_theta", rules.theta)
    if rules.local_theta is not None:
        rope.metadata["rope.freq_base_swa"] = _number(local, "rope_theta", rules.local_theta)
        if _type(local, rules) != "default":
            raise ExportError(
                f"config.json: the sliding layers have rope type {_type(local, rules)!r}, llama.cpp has only "
                "'default' for them."
            )
    kind = _type(main, rules)
    if kind not in rules.types:
        raise ExportError(
            f"config.json: rope type {kind!r} is not among those that llama.cpp has for this architecture: "
            f"{', '.join(rules.types)}."
        )
    _SCALINGS[kind](rope, main, config, dimension)
    return rope


def _parameters(config: Mapping[str, Any], rules: RopeRules) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of full and of sliding layers as transformers 5 writes them, from old forms too."""
    found, old = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    # transformers sees parameters of each type of layer only, where the two differ
    nested = rules.local_theta is not None or "full_attention" in found or "sliding_attention" in found
    main = {**(_object(found, "full_attention") if nested else found), **old}
    local = dict(_object(found, "sliding_attention")) if nested else {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            main.setdefault(key, config[key])
    if config.get("rope_local_base_freq") is not None:
        local.setdefault("rope_theta", config["rope_local_base_freq"])
    return main, local


def _object(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = holder.get(key) or {}
    if not isinstance(found, dict):
        raise ExportError(f"config.json: {key!r} is {str(found)[:60]!r}, expected an object.")
    return found


def _type(parameters: Mapping[str, Any], rules: RopeRules) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return rules.aliases.get(kind, kind) if isinstance(kind, str) else str(kind)


def _dimension(config: Mapping[str, Any], main: Mapping[str, Any], rules: RopeRules) -> int:
    head = count("head_dim", config)
    dimension = int(head * _number(main, "partial_rotary_factor", 1.0))
    if dimension != head and not rules.partial:
        raise ExportError(
            f"config.json: {dimension} of a head's {head} dimensions are rotated (partial_rotary_factor); "
            "llama.cpp rotates whole heads in this architecture."
        )
    if dimension <= 0 or dimension % 2 or dimension > head:
        raise ExportError(
            f"config.json: {dimension} rotated dimensions, expected an even number up to {head}."
        )
    return dimension


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _SMALLEST < value < _LARGEST:
        raise ExportError(
            f"config.json: the rope parameter {key!r} must be a number above 0 that float32 can hold, found "
            f"{str(value)[:60]}."
        )
    return float(value)


def _original_context(main: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """transformers lets the config's own key win over the one among the rope parameters."""
    for holder, key in (
        (config, "original_max_position_embeddings"),
        (main, "original_max_position_embeddings"),
        (config, "max_position_embeddings"),
    ):
        if holder.get(key) is not None:
            length = int(_number(holder, key))
            if not 1 < length < 1 << 32:
                raise ExportError(f"config.json: {key!r} must be a count of tokens from 2, found {length}.")
            return length
    raise ExportError("config.json: has no 'max_position_embeddings'.")


def _factor(main: Mapping[str, Any], config: Mapping[str, Any], original: int) -> float:
    return _number(main, "factor", _number(config, "max_position_embeddings") / original)


def _default(rope: Rope, main: Mapping[str, Any], config: Mapping[str, Any], dimension: int) -> None:
    pass


def _linear(rope: Rope, main: Mapping[str, Any], config: Mapping[str, Any], dimension: int) -> None:
    rope.metadata["rope.scaling.type"] = "linear"
    rope.metadata["rope.scaling.factor"] = _number(main, "factor")


def _dynamic(rope: Rope, main: Mapping[str, Any], config: Mapping[str, Any], dimension: int) -> None:
    """Up to max_position_embeddings nothing is scaled; beyond it the base changes with the length."""
    length = int(_number(config, "max_position_embeddings"))
    rope.notes.append(
        f"dynamic rope scaling begins at {length:,} tokens and is not in llama.cpp: up to there the results "
        "are the original's, beyond it they are not scaled"
    )


def _yarn(rope: Rope, main: Mapping[str, Any], config: Mapping[str, Any], dimension: int) -> None:
    for key, expected in _DEFAULT_BETA.items():
        if _number(main, key, expected) != expected:
            raise ExportError(
                f"config.json: yarn scaling with {key} {main[key]}; llama.cpp computes with {expected:g} in "
                "this architecture."
            )
    if main.get("truncate") is False:
        raise ExportError("config.json: yarn scaling with truncate false; llama.cpp always truncates.")
    original = _original_context(main, config)
    factor = _factor(main, config, original)
    rope.metadata["rope.scaling.type"] = "yarn"
    rope.metadata["rope.scaling.factor"] = factor
    rope.metadata["rope.scaling.original_context_length"] = original
    # llama.cpp multiplies what the paper suggests by this
    rope.metadata["rope.scaling.attn_factor"] = _yarn_attention(main, factor) / _mscale(factor, 1.0)


def _yarn_attention(main: Mapping[str, Any], factor: float) -> float:
    if main.get("attention_factor") is not None:
        return _number(main, "attention_factor")
    if main.get("mscale") and main.get("mscale_all_dim"):
        return _mscale(factor, _number(main, "mscale")) / _mscale(factor, _number(main, "mscale_all_dim"))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: Rope, main: Mapping[str, Any], config: Mapping[str, Any], dimension: int) -> None:
    factor = _number(main, "factor")
    low, high = _number(main, "low_freq_factor"), _number(main, "high_freq_factor")
    if low >= high:
        raise ExportError(f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}.")
    turns = _original_context(main, config) * _frequencies(main, rope, dimension) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    # llama.cpp divides a frequency by its factor
    rope.tensors["rope_freqs.weight"] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _frequencies(main: Mapping[str, Any], rope: Rope, dimension: int) -> np.ndarray:
    return rope.metadata["rope.freq_base"] ** -(np.arange(0, dimension, 2) / dimension)


def _longrope(rope: Rope, main: Mapping[str, Any], config: Mapping[str, Any], dimension: int) -> None:
    original = _original_context(main, config)
    factor = _factor(main, config, original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    rope.metadata["rope.scaling.type"] = "longrope"
    rope.metadata["rope.scaling.original_context_length"] = original
    rope.metadata["rope.scaling.attn_factor"] = _number(main, "attention_factor", attention)
    rope.notes.append(
        f"rope factors for long texts count where the context is above {original:,} tokens; the original "
        "chooses by the length of the text"
    )
    for length in ("long", "short"):
        factors = main.get(f"{length}_factor")
        numbers = isinstance(factors, list) and all(
            type(value) in (int, float) and _SMALLEST < value < _LARGEST for value in factors
        )
        if not numbers or len(factors) != dimension // 2:
            found = f"{len(factors)} values" if isinstance(factors, list) else repr(factors)
            raise ExportError(
                f"config.json: {length}_factor of longrope must be {dimension // 2} numbers above 0, found "
                f"{found}."
            )
        rope.tensors[f"rope_factors_{length}.weight"] = np.array(factors, dtype=np.float32)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
