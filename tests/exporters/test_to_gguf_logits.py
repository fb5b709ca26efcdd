"""What llama.cpp computes with an exported model is what PyTorch computes with the checkpoint."""

import pytest

pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from tiny_checkpoints import (  # noqa: E402
    GELU,
    MODELS,
    llama_logits,
    plain_vocabulary,
    relative_difference,
    tiny_checkpoint,
)

from edgeinfer.exporters import vocabulary  # noqa: E402
from edgeinfer.exporters.to_gguf import export_gguf  # noqa: E402


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)


@pytest.mark.parametrize("architecture", MODELS)
def test_float32_logits_are_pytorchs(tmp_path, architecture):
    tiny = tiny_checkpoint(tmp_path / "tiny", architecture)
    export_gguf(tiny.folder, tmp_path / "tiny.gguf")
    found = llama_logits(tmp_path / "tiny.gguf", tiny.tokens)
    assert relative_difference(found, tiny.rounded) < 1e-5
    assert relative_difference(found, tiny.logits) < (1e-3 if architecture in GELU else 1e-5)
