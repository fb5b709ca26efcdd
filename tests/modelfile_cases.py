"""What the tests of the model file reader share: a small model to write, and how a file is refused."""

from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from gguf_bytes import tensor

from edgeinfer.errors import ModelFileError
from edgeinfer.modelfile import read_model_file

TOKENS = b"tokenizer.ggml.tokens"
ONE_TENSOR = tensor(b"output.weight", (8,))
DATA = bytes(32)  # of it


def write_with_package(path: Path, **options: int) -> None:
    """A file of seven tensors in two layers, written by the gguf package."""
    writer = gguf_package.GGUFWriter(path, "llama", **options)
    writer.add_block_count(2)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_array("test.words", ["one", "two"])
    for index, name in enumerate(["token_embd.weight", "output.weight", "output_norm.weight"]):
        writer.add_tensor(name, np.full((4, 32), index, dtype=np.float16))
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", np.ones((3, 64), dtype=np.float32))
        writer.add_tensor(f"blk.{layer}.attn_q.bias", np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(path: Path, words: str) -> None:
    """Reading the file fails with an error that names the folder and matches `words`."""
    with pytest.raises(ModelFileError, match=words) as error:
        read_model_file(path)
    assert str(path.parent) in str(error.value)
