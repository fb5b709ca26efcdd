"""An output matrix that is, or is said to be, the token embedding."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs pip install "edgeinfer[export]"')
transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_checkpoints import llama_logits, plain_vocabulary, tiny_checkpoint  # noqa: E402

from edgeinfer.errors import ExportError  # noqa: E402
from edgeinfer.exporters import vocabulary  # noqa: E402
from edgeinfer.exporters.to_gguf import export_gguf  # noqa: E402
from edgeinfer.modelfile import read_model_file  # noqa: E402


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)


def _tie(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))


def _change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_config_that_ties_an_output_matrix_of_its_own(tmp_path):
    """The logits are those of transformers, which believes the weights."""
    tiny = tiny_checkpoint(tmp_path / "tiny", "llama")
    _tie(tiny.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([tiny.tokens])).logits[0].numpy()
    report = export_gguf(tiny.folder, tmp_path / "out.gguf")
    found = llama_logits(tmp_path / "out.gguf", tiny.tokens)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert "the checkpoint holds another one, which is used" in report.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_output_matrix_that_is_stored_too_is_written_once(tmp_path, dtype):
    llama = tiny_checkpoint(tmp_path / "tiny", "llama", dtype="bfloat16").folder

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(dtype, copy=True)

    _tie(llama)
    _change_tensors(llama, change)
    report = export_gguf(llama, tmp_path / "out.gguf")
    names = {tensor.name for tensor in read_model_file(tmp_path / "out.gguf").tensors}
    assert "token_embd.weight" in names and "output.weight" not in names and not report.notes


def test_gemma2_has_no_output_matrix_of_its_own(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "gemma2").folder

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    _change_tensors(folder, change)
    with pytest.raises(ExportError, match="'lm_head.weight' is not the token embedding, .* no other output"):
        export_gguf(folder, tmp_path / "out.gguf")
