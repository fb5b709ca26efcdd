"""`edgeinfer trace`: the experts it records are those that stock llama.cpp's routers choose."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from tiny import tiny_model

from edgeinfer.cli import cli
from edgeinfer.engines.llama import LlamaContext, LlamaModel
from edgeinfer.engines.opening import open_engine
from edgeinfer.errors import BudgetError, EngineError
from edgeinfer.experts.predictors import judge
from edgeinfer.experts.replay import replay
from edgeinfer.experts.trace import Trace
from edgeinfer.model import Model
from edgeinfer.modelfile import read_model_file

MIB = 1 << 20
PROMPT = "A river runs"
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    """struct ggml_tensor as far as its name, which edgeinfer._native checks against the library."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def stock_choices(path, batches):
    """Layer -> (tokens, used) experts that stock llama.cpp chooses, by the names that it gives to the choices."""
    found: dict[int, list[np.ndarray]] = {}

    @_CALLBACK
    def look(address, ask, _data):
        tensor = Tensor.from_address(address)
        if not tensor.name.startswith(b"ffn_moe_topk-"):
            return False
        if not ask:
            rows = [
                [
                    ctypes.c_int32.from_address(tensor.data + t * tensor.nb[1] + k * tensor.nb[0]).value
                    for k in range(tensor.ne[0])
                ]
                for t in range(tensor.ne[1])
            ]
            found.setdefault(int(tensor.name.split(b"-")[1]), []).append(np.array(rows))
        return True

    with (
        LlamaModel(path, load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP, use_extra_bufts=False) as model,
        LlamaContext(
            model,
            context_length=256,
            threads=1,
            flash_attention=None,
            cb_eval=ctypes.cast(look, ctypes.c_void_p).value,
        ) as context,
    ):
        for batch in batches:
            context.decode(batch)
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def smallest_budget(path, **options):
    """Bytes: what this process holds counts too, and that depends on the tests before this one."""
    with pytest.raises(BudgetError) as refused:
        open_engine(path, memory=1, **options)
    return refused.value.smallest_bytes


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3moe", "deepseek2"])
def test_what_is_recorded_is_what_stock_chooses(tmp_path, arch, tight):
    path = tiny_model(tmp_path, arch, "Q4_0", layers=4)
    options = {"context_length": 256, "threads": 1, "record_routing": True}
    memory = smallest_budget(path, **options) + MIB if tight else "4GiB"
    with Model(open_engine(path, memory=memory, **options)) as model:
        list(model.generate(PROMPT, max_tokens=12, temperature=0))
        prompt = model.engine.model.tokenize(PROMPT, True, True)
        trace = model.engine.take_trace(len(prompt))
        generated = model.stats.tokens
    expected = stock_choices(path, [prompt, *([token] for token in generated[:-1])])
    assert trace.num_tokens == len(prompt) + len(generated) - 1
    assert trace.decode.sum() == len(generated) - 1
    for number, layer in enumerate(sorted(expected)):
        rows = trace.routed[-len(expected[layer]) :, number]
        assert np.array_equal(rows, expected[layer])
    assert (trace.predicted[trace.decode][1:, 1:, 0] >= 0).all()
    trace.check_model(read_model_file(path))


def test_the_command_writes_a_trace_that_replay_reads(tmp_path):
    path = tiny_model(tmp_path, "olmoe", "Q8_0")
    output = tmp_path / "routing.trace"
    arguments = ["trace", str(path), "-p", PROMPT, "-n", "20", "-o", str(output), "--seed", "1", "--threads", "1"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert Trace.read(output).num_experts == 8
    replayed = CliRunner().invoke(cli, ["replay", str(output), "--memory", "1MiB", "--model", str(path)])
    assert replayed.exit_code == 0, replayed.output
    assert "Belady" in replayed.output


def test_models_without_experts_and_folders_that_are_not_there_are_refused(tmp_path):
    dense = tiny_model(tmp_path, "llama", "Q4_0")
    with pytest.raises(EngineError, match="has no experts"):
        open_engine(dense, memory="1GiB", context_length=64, record_routing=True)
    missing = tmp_path / "missing" / "routing.trace"
    result = CliRunner().invoke(cli, ["trace", str(dense), "-p", PROMPT, "-o", str(missing)])
    assert result.exit_code == 1
    assert "there is no folder" in result.output
    assert not Path(missing).parent.exists()


def test_the_default_policy_is_not_below_lru_on_learned_routing():
    path = Path(__file__).parents[1] / "models" / "story-moe.gguf"
    with Model(open_engine(path, memory="1GiB", context_length=256, threads=1, record_routing=True)) as model:
        list(model.generate("Once upon a time there was a", max_tokens=150, seed=1))
        trace = model.engine.take_trace(model.stats.prompt_tokens)
    for slots in (16, 32, 48, 64, 96, 112):
        rates = replay(trace, slots, ("lrfu", "lru")).policies
        assert rates["lrfu"].decode >= rates["lru"].decode - 0.005
    gate = judge(trace, "gate")
    assert gate.recall_k > 0.5  # two of sixteen: 0.125 by chance
