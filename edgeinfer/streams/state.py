"""Which outputs of a model are the state that goes back in as inputs.

A pair has the same type, shapes that agree, and names that differ only in words that say "before" and
"after": state/stateN, h/hn, conv_cache/conv_cache_out, past_key_values.0.key/present.0.key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from edgeinfer.errors import InputError
from edgeinfer.onnx.ports import Port

#: Words of a name that say which side it is on; the rest of both names has to be the same.
_SIDES = frozenset(
    ("in", "out", "input", "output", "past", "present", "old", "new", "prev", "previous", "next", "last")
    + ("cur", "current", "n", "i", "o", "init", "final", "updated")
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
#: Words without which a pair of names is not taken for state: two tensors may just be called x and y.
_STATE = re.compile(
    r"state|cache|hidden|memory|buffer|carry|past|prev|(^|_)(h|c|hx|cx|hn|cn|h0|c0|mem)($|_|[0-9])",
    re.IGNORECASE,
)


def find_state(inputs: Sequence[Port], outputs: Sequence[Port], known: Mapping[str, str]) -> dict[str, str]:
    """{input: output} of the model's state; `known` pairs are checked and taken first. Empty: it has none.

    Raises InputError where a known pair cannot be, and where several outputs fit an input equally well.
    """
    by_name = {port.name: port for port in inputs}
    results = {port.name: port for port in outputs}
    pairs = {}
    for name, output in known.items():
        _check_known(name, output, by_name, results)
        pairs[name] = output
    for port in inputs:
        if port.name in pairs or not _STATE.search(port.name):
            continue
        found = [
            output.name
            for output in outputs
            if output.name not in pairs.values()
            and agree(port, output)
            and _stem(port.name) == _stem(output.name)
        ]
        if len(found) > 1:
            raise InputError(
                f"Input {port.name!r} looks like state, but which output follows it is unclear: "
                f"{', '.join(found)}. Say --state OUTPUT={port.name}."
            )
        if found:
            pairs[port.name] = found[0]
    return pairs


def candidates(port: Port, outputs: Sequence[Port]) -> list[str]:
    """Outputs that could be the next value of an input, by type and shape."""
    return [output.name for output in outputs if agree(port, output)]


def agree(port: Port, output: Port) -> bool:
    """Whether the output can be fed as the input. Sizes that are not stated agree with all."""
    return (
        port.dtype == output.dtype
        and len(port.shape) == len(output.shape)
        and all(
            one == other or not (isinstance(one, int) and isinstance(other, int))
            for one, other in zip(port.shape, output.shape)
        )
    )


def zero_state(port: Port) -> np.ndarray:
    """The state before the first chunk: zeros. Sizes that vary are 1 (the batch), or 0 where they count what
    is past."""
    past = re.search(r"past|key_values", port.name) is not None
    sizes = []
    for axis, size in enumerate(port.shape):
        sizes.append(size if isinstance(size, int) else 0 if past and axis > 0 else 1)
    return np.zeros(sizes, port.dtype)


def _stem(name: str) -> tuple[str, ...]:
    """The words of a name without those that say which side it is on; h0, hn and hx are h."""
    name = re.sub(r"(^|_)([hc])[0nx](?=$|_)", r"\1\2", name.replace("key_values", ""))
    return tuple(word for word in map(str.lower, _WORD.findall(name)) if word not in _SIDES)


def _check_known(name: str, output: str, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> None:
    if name not in inputs:
        raise InputError(f"State: the model has no input {name!r}. Its inputs are {', '.join(inputs)}.")
    if output not in outputs:
        raise InputError(f"State: the model has no output {output!r}. Its outputs are {', '.join(outputs)}.")
    if not agree(inputs[name], outputs[output]):
        raise InputError(
            f"State: output {output!r} is {outputs[output].describe()}, input {name!r} is "
            f"{inputs[name].describe()}: "
            "one cannot become the other."
        )
