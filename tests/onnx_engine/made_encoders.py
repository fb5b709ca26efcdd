"""Made encoders, small enough for tests, and where their memory stands."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/

from benchmarks.onnx_maker import Encoder, make_encoder  # noqa: E402

MIB = 1 << 20
FLOAT = Encoder(layers=4, width=512, ffn=2048)  # 50 MB
FOUR_BITS = Encoder(layers=4, width=1024, ffn=4096, bits=4)  # 31 MB
TABLE = Encoder(layers=1, width=512, ffn=2048, vocabulary=20_000)  # 41 MB of them the embedding


def encoder_file(folder, encoder):
    path = folder / "encoder.onnx"
    return make_encoder(path, encoder)


def tokens(batch, length=16, vocabulary=1000):
    numbers = np.arange(batch * length, dtype=np.int64) * 7919 % vocabulary
    return {"tokens": numbers.reshape(batch, length)}
