"""Decoders exported to ONNX: the logits and the greedy text of transformers, from export to `edgeinfer.load`."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason='needs pip install "edgeinfer[export]"')
transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from onnx_layout import check_layout  # noqa: E402
from real_onnx import session  # noqa: E402
from tiny_checkpoints import CONTEXT, add_tokenizer, tiny_checkpoint  # noqa: E402

import edgeinfer  # noqa: E402
from edgeinfer.cli import cli  # noqa: E402
from edgeinfer.errors import ExportError, PromptError  # noqa: E402
from edgeinfer.exporters.onnx_decoder import styles  # noqa: E402
from edgeinfer.exporters.onnx_export import export_onnx  # noqa: E402

PROMPT = "The river ran on, and the mole ran with it. def f(x): return"
QUANTS = {None: 1e-5, "F16": 5e-3, "INT8": 0.1, "INT4": 0.6}


@pytest.fixture(scope="module", params=sorted(styles()))
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    made = tiny_checkpoint(folder, request.param)
    add_tokenizer(folder)
    return made


def greedy(folder, prompt, count):
    """Of transformers, with its own cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_of_transformers(tiny, quant, tmp_path):
    """All at once, and in pieces upon a cache that grows."""
    report = export_onnx(tiny.folder, tmp_path / "m.onnx", quant=quant)
    check_layout(tmp_path / "m.onnx")
    assert (report.quantized > 5) == (quant in ("INT8", "INT4")) and set(report.files) >= {"tokenizer.json"}
    run = session(tmp_path / "m.onnx")
    caches = [port for port in run.get_inputs() if port.name.startswith("past")]
    for pieces in ([20], [7, 9, 1, 1, 1, 1]):
        kind = np.float16 if quant == "F16" else np.float32
        past = {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), kind) for port in caches}
        found, done = [], 0
        for count in pieces:
            ids = np.array([tiny.tokens[done : done + count]])
            done += count
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, done), np.int64), **past}
            results = dict(zip([port.name for port in run.get_outputs()], run.run(None, feeds)))
            found.append(results["logits"][0])
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
        difference = np.abs(np.concatenate(found) - tiny.logits).max() / np.abs(tiny.logits).max()
        assert difference < QUANTS[quant]


def test_greedy_text_of_transformers(tiny, tmp_path):
    """The command, its check, and a prompt that fills the context."""
    target = tmp_path / "m.onnx"
    done = CliRunner().invoke(cli, ["export", str(tiny.folder), "-o", str(target), "--check", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["check"]["passed"] and facts["check"]["relative_difference"] < 1e-4
    assert facts["check"]["result_perplexity"] == pytest.approx(facts["check"]["source_perplexity"], rel=1e-4)
    with edgeinfer.load(target, threads=1) as model:
        prompt = model.engine.model.tokenize(PROMPT, True, True)
        assert model.engine.in_place and model.context_length == CONTEXT
        list(model.generate(PROMPT, temperature=0))
        assert model.finish in ("context", "end")
        assert model.stats.tokens == greedy(tiny.folder, prompt, len(model.stats.tokens))
        with pytest.raises(PromptError, match=f"the context holds {CONTEXT}"):
            model.generate(PROMPT * 40)


def test_the_cache_is_not_copied(tmp_path):
    """Keys of a step are written behind those of before, at the same address; what is behind them stays."""
    tiny_checkpoint(tmp_path / "hf", "qwen3")
    add_tokenizer(tmp_path / "hf")
    export_onnx(tmp_path / "hf", tmp_path / "m.onnx")
    with edgeinfer.load(tmp_path / "m.onnx", ctx=64, threads=1) as model:
        engine = model.engine
        engine.prefill([5, 6, 7])
        caches = engine._cache.inputs()
        addresses = {name: value.data_ptr() for name, value in caches.items()}
        before = {name: value.numpy().copy() for name, value in caches.items()}
        for value in caches.values():
            value.numpy()[:, :, 10:] = 77.0
        results = engine._model.run_values(engine._inputs([8], 3), engine._outputs())
        for name, value in engine._cache.inputs().items():
            present = results[engine._ports.pairs[name]]
            assert value.data_ptr() == present.data_ptr() == addresses[name]
            now = value.numpy()
            assert (now[:, :, :3] == before[name][:, :, :3]).all() and now[:, :, 3].any()
            assert (now[:, :, 10:] == 77.0).all()


def test_an_architecture_without_a_style_is_named(tmp_path):
    tiny_checkpoint(tmp_path / "hf", "mixtral")
    with pytest.raises(ExportError, match="mixtral cannot become ONNX. Expected one of llama, .*GGUF can hold"):
        export_onnx(tmp_path / "hf", tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="INT8_STATIC is not for decoders|needs --calibration"):
        export_onnx(tmp_path / "hf", tmp_path / "m.onnx", quant="INT8_STATIC")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_heads_rotated_in_part_are_refused_where_transformers_rotates_all(tmp_path):
    tiny_checkpoint(tmp_path / "hf", "llama")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "partial_rotary_factor": 0.5}))
    with pytest.raises(ExportError, match="partial_rotary_factor is 0.5, expected 1: .*whole heads in llama"):
        export_onnx(tmp_path / "hf", tmp_path / "m.onnx")
    assert [found.name for found in tmp_path.iterdir()] == ["hf"]


def test_the_file_says_what_it_is(tmp_path):
    tiny_checkpoint(tmp_path / "hf", "llama")
    add_tokenizer(tmp_path / "hf")
    export_onnx(tmp_path / "hf", tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert facts["edgeinfer.task"] == "text-generation" and facts["edgeinfer.context_length"] == str(CONTEXT)
