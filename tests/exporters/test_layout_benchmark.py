"""benchmarks.layout compares files of one model fairly: the same plan, the same tokens, each token against
the first's.
"""

import json
import sys

import pytest
from tiny import tiny_model

from benchmarks import layout as benchmark
from edgeinfer.exporters.layout import lay_out


@pytest.mark.parametrize(("arch", "layers"), [("deepseek2", 6), ("llama", 10)])
def test_two_files_of_one_model(tmp_path, monkeypatch, capsys, arch, layers):
    source = tiny_model(tmp_path, arch, "Q4_0", layers=layers, ffn=2048 if arch == "llama" else 1024, embedding=512)
    lay_out(source, tmp_path / "out.gguf")
    command = ["layout", source, tmp_path / "out.gguf", "--share", "0.6", "--tokens", "6", "--warmup", "2"]
    command += ["--threads", "1", "--json", tmp_path / "numbers.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    assert benchmark.main() == 0
    first, second = json.loads((tmp_path / "numbers.json").read_text())
    assert first["speed"] == 1 and first["same_tokens"] and second["same_tokens"]
    assert second["read_bytes_per_token"] == pytest.approx(first["read_bytes_per_token"], rel=0.5)
    assert first["read_bytes_per_token"] > 0 and 0 < second["median_token_seconds"] < 10
    assert "out.gguf: " in capsys.readouterr().out


def test_a_model_that_fits(tmp_path, monkeypatch):
    source = tiny_model(tmp_path, "llama", "Q4_0")
    monkeypatch.setattr(sys, "argv", ["layout", str(source), "--share", "3"])
    with pytest.raises(SystemExit, match="all of the model fits. Give a smaller --share"):
        benchmark.main()
