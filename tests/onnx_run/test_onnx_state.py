"""Which outputs are a model's state, found by name, type and shape."""

import numpy as np
import pytest

from edgeinfer.errors import InputError
from edgeinfer.onnx.ports import Port
from edgeinfer.streams.state import find_state, zero_state


def port(name, shape=(1, 4), kind="float32"):
    return Port(name, np.dtype(kind), kind, tuple(shape))


def pairs(inputs, outputs, known=None):
    def made(names):
        return [port(name) if isinstance(name, str) else port(*name) for name in names]

    return find_state(made(inputs), made(outputs), known or {})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("state", "stateN"),
        ("h", "hn"),
        ("h0", "hn"),
        ("conv_cache", "conv_cache_out"),
        ("hidden_in", "hidden_out"),
        ("cache_last_channel", "cache_last_channel_next"),
        ("cached_len_3", "new_cached_len_3"),
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.11.value", "present.11.value"),
        ("prev_state", "next_state"),
    ],
)
def test_pairs_that_are_in_use(before, after):
    assert pairs(["x", before], ["y", after]) == {before: after}


def test_layers_are_not_mixed_up():
    inputs = [f"past_key_values.{layer}.{part}" for layer in (0, 1, 10) for part in ("key", "value")]
    outputs = [name.replace("past_key_values", "present") for name in reversed(inputs)]
    found = pairs(["ids", *inputs], ["logits", *outputs])
    assert found == {name: name.replace("past_key_values", "present") for name in inputs}


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["input"], ["output"]),  # an effect on pictures is no state
        (["x_in"], ["x_out"]),
        (["x", ("state", (1, 4))], ["y", ("state_out", (1, 5))]),
        (["x", ("state", (1, 4), "float32")], ["y", ("state_out", (1, 4), "float16")]),
        (["x", "state"], ["y", "memory_out"]),
    ],
)
def test_what_is_no_pair(inputs, outputs):
    assert pairs(inputs, outputs) == {}


def test_an_unclear_one_lists_its_candidates():
    with pytest.raises(
        InputError, match=r"'state' looks like state.*state_out, new_state.*--state OUTPUT=state"
    ):
        pairs(["x", "state"], ["y", "state_out", "new_state"])
    assert pairs(["x", "state"], ["y", "state_out", "new_state"], {"state": "new_state"}) == {
        "state": "new_state"
    }


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"nope": "y"}, "no input 'nope'"),
        ({"state": "nope"}, "no output 'nope'"),
        ({"state": "z"}, r"'z' is float32 \[2\], input 'state' is float32 \[1, 4\]"),
    ],
)
def test_wrong_pairs_are_refused(known, message):
    with pytest.raises(InputError, match=message):
        pairs(["x", "state"], ["y", ("z", (2,))], known)


def test_the_first_state_is_zeros():
    assert zero_state(port("state", (2, "batch", 128))).shape == (2, 1, 128)
    assert zero_state(port("past_key_values.0.key", ("batch", 4, "past", 64), "float16")).shape == (
        1,
        4,
        0,
        64,
    )
