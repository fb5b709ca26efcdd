"""Random weights, made directly in the block formats of ggml.

Quantizing billions of random floats would take minutes; random bits are already valid quants, so a chunk is
filled with random bytes and only the scales are written over. The scales are chosen so that the dequantized
weights have mean 0 and a given standard deviation. Block layouts: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

CHUNK_BYTES = 8 << 20

# (weights a block, bytes a block)
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q8_0": (32, 34),
    "MXFP4": (32, 17),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}


def row_bytes(type: str, length: int) -> int:
    """Bytes of one row of `length` weights; ValueError where the row is not whole blocks."""
    weights, size = BLOCKS[type]
    if length % weights:
        raise ValueError(f"expected a row of a multiple of {weights} weights for {type}, found {length}")
    return length // weights * size


class RandomStream:
    """Random bytes that depend on (seed, name) only: SFC64's raw output, the same in every numpy."""

    def __init__(self, seed: int, name: str):
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._bits = np.random.SFC64(int.from_bytes(key, "little"))

    def bytes(self, count: int) -> np.ndarray:
        """A writable uint8 array of `count` random bytes."""
        return self._bits.random_raw((count + 7) // 8).view(np.uint8)[:count]

    def normal(self, count: int) -> np.ndarray:
        """`count` float32 values of mean 0 and standard deviation 1 (Box-Muller)."""
        uniform = (self._bits.random_raw(count * 2) >> 11) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-uniform[:count]))
        return (radius * np.cos(2 * np.pi * uniform[count:])).astype(np.float32)


def _spread() -> np.ndarray:
    """256 scale factors between 0.75 and 1.25 whose mean square is 1."""
    factors = np.linspace(0.75, 1.25, 256)
    return factors / np.sqrt(np.mean(factors**2))


def _signed_scales(std: float, quant_mean_square: float) -> np.ndarray:
    """256 float16 scales as uint16. Signs alternate, because quants -8..7 have a mean of -0.5."""
    scales = _spread() * std / np.sqrt(quant_mean_square)
    scales[::2] *= -1
    return scales.astype(np.float16).view(np.uint16)


def _fill_q4_0(data: np.ndarray, std: float) -> None:
    # float16 d, 32 quants of 4 bits: weight = d * (q - 8)
    halves = data.view(np.uint16).reshape(-1, 9)
    mean_square = np.mean((np.arange(16.0) - 8) ** 2)
    halves[:, 0] = _signed_scales(std, mean_square)[halves[:, 0] & 255]


def _fill_q8_0(data: np.ndarray, std: float) -> None:
    # float16 d, 32 int8 quants: weight = d * q
    halves = data.view(np.uint16).reshape(-1, 17)
    mean_square = np.mean(np.arange(-128.0, 128) ** 2)
    halves[:, 0] = _signed_scales(std, mean_square)[halves[:, 0] & 255]


def _packed_scales() -> np.ndarray:
    """256 x 12 bytes: eight 6-bit scales of 32..63, each with a minimum equal to its scale."""
    scales = np.random.Generator(np.random.SFC64(0)).permuted(np.tile(np.arange(32, 64), 64)).reshape(256, 8)
    low, high = scales[:, :4], scales[:, 4:]
    first = low | (high >> 4) << 6
    return np.concatenate([first, first, high & 15 | (high & 15) << 4], axis=1).astype(np.uint8)


def _fill_q4_k(data: np.ndarray, std: float) -> None:
    # float16 d, float16 dmin, 12 bytes of packed scales and minima, 256 quants of 4 bits:
    # weight = d * scale * q - dmin * minimum; with dmin = 7.5 d and minimum = scale the mean is 0
    halves = data.view(np.uint16).reshape(-1, 72)
    blocks = data.reshape(-1, 144)
    mean_square = np.mean((np.arange(16.0) - 7.5) ** 2) * np.mean(np.arange(32.0, 64) ** 2)
    scales = (_spread() * std / np.sqrt(mean_square)).astype(np.float16)
    minima = (scales.astype(np.float32) * 7.5).astype(np.float16)
    choice = halves[:, 0] & 255
    halves[:, 0] = scales.view(np.uint16)[choice]
    halves[:, 1] = minima.view(np.uint16)[choice]
    blocks[:, 4:16] = _packed_scales()[blocks[:, 4]]


def _fill_q6_k(data: np.ndarray, std: float) -> None:
    # 128 + 64 bytes of 6-bit quants, 16 int8 scales, float16 d: weight = d * scale * (q - 32)
    halves = data.view(np.uint16).reshape(-1, 105)
    blocks = data.reshape(-1, 210)
    magnitudes = 64 + np.arange(256) // 4
    scales = np.where(np.arange(256) % 2, magnitudes, -magnitudes).astype(np.int8)
    mean_square = np.mean((np.arange(64.0) - 32) ** 2) * np.mean(scales.astype(float) ** 2)
    blocks[:, 192:208] = scales.view(np.uint8)[blocks[:, 192:208]]
    halves[:, 104] = (
        (_spread() * std / np.sqrt(mean_square)).astype(np.float16).view(np.uint16)[halves[:, 104] & 255]
    )


def _fill_mxfp4(data: np.ndarray, std: float) -> None:
    # exponent byte e, 32 quants of 4 bits (e2m1, symmetric): weight = 2^(e - 127) * value
    blocks = data.reshape(-1, 17)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exponent = 127 + round(float(np.log2(std / np.sqrt(np.mean(values**2)))))
    blocks[:, 0] = exponent


def _fill_f16(data: np.ndarray, std: float) -> None:
    # uniform in +-sqrt(3) std, by table: ten times as fast as drawing normal values
    table = (np.linspace(-1, 1, 65536) * np.sqrt(3) * std).astype(np.float16)
    halves = data.view(np.uint16)
    halves[:] = table.view(np.uint16)[halves]


def _fill_f32(data: np.ndarray, std: float) -> None:
    words = data.view(np.uint32)
    words[:] = ((words * 2.0**-31 - 1) * np.sqrt(3) * std).astype(np.float32).view(np.uint32)


FILL: dict[str, Callable[[np.ndarray, float], None]] = {
    "F32": _fill_f32,
    "F16": _fill_f16,
    "Q4_0": _fill_q4_0,
    "Q8_0": _fill_q8_0,
    "MXFP4": _fill_mxfp4,
    "Q4_K": _fill_q4_k,
    "Q6_K": _fill_q6_k,
}


def random_rows(stream: RandomStream, type: str, length: int, rows: int, std: float) -> Iterator[np.ndarray]:
    """`rows` rows of `length` weights as uint8 chunks of at most CHUNK_BYTES (one row, if that is longer)."""
    size = row_bytes(type, length)
    step = max(1, CHUNK_BYTES // size)
    for first in range(0, rows, step):
        chunk = stream.bytes(min(step, rows - first) * size)
        FILL[type](chunk, std)
        yield chunk
