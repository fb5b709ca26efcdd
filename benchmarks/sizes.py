"""The shape of a model of a wanted size: what is not given is chosen."""

from __future__ import annotations

from benchmarks.architecture import Architecture
from benchmarks.weights import BLOCKS

# (bytes in Q4_0, embedding, ffn): up to so many bytes a dense model has this shape; Llama's, where it has one
_WIDTHS = (
    (60e6, 512, 1536),
    (300e6, 1024, 2816),
    (1.3e9, 2048, 5632),
    (2.2e9, 2560, 6912),
    (6e9, 4096, 11008),
    (12e9, 5120, 13824),
    (float("inf"), 8192, 22016),
)
MOST_LAYERS = 64  # beyond that the FFN grows instead
_EXPERT_NARROWING = 2  # models of many small experts are narrower than dense ones of their size
_BYTES_PER_TOKEN = 24  # of a vocabulary entry in the metadata, about


def file_bytes(architecture: Architecture, type: str, dimensions: dict[str, int], tied: bool | None) -> int:
    """About the size of the file (padding left out)."""
    tensors = architecture.make_tensors(type, dimensions, tied)
    return sum(tensor.nbytes for tensor in tensors) + _BYTES_PER_TOKEN * dimensions["vocabulary"]


def _width(architecture: Architecture, type: str, size: float, experts: int) -> tuple[int, int]:
    weights, block = BLOCKS[type]
    as_q4 = size / (block / weights) * (18 / 32)
    embedding, ffn = next((width, ffn) for limit, width, ffn in _WIDTHS if as_q4 <= limit)
    if experts > 16:
        return embedding // _EXPERT_NARROWING, max(256, ffn // 16 // 256 * 256)
    if experts:
        return embedding // _EXPERT_NARROWING, ffn // _EXPERT_NARROWING // 256 * 256
    return embedding, ffn


def fit(
    architecture: Architecture, type: str, size: int | None, tied: bool | None, given: dict[str, int]
) -> dict[str, int]:
    """All dimensions of a model of about `size` bytes, `given` ones kept; ValueError where none fit."""
    dimensions = dict(given)
    experts = dimensions.get("experts", architecture.defaults.get("experts", 0))
    embedding, ffn = _width(architecture, type, size or 0, int(experts))
    dimensions.setdefault("embedding", embedding)
    dimensions.setdefault("ffn", ffn)
    dimensions.setdefault("heads", max(1, dimensions["embedding"] // 128))
    dimensions.setdefault("vocabulary", 32000)
    if size is None:
        dimensions.setdefault("layers", 4)
        return architecture.resolve(dimensions)

    def bytes_of(**change: int) -> int:
        return file_bytes(architecture, type, architecture.resolve({**dimensions, **change}), tied)

    if "layers" not in given:
        # not from the first layer, which may be of another kind
        some, a_layer = bytes_of(layers=4), bytes_of(layers=5) - bytes_of(layers=4)
        most = MOST_LAYERS if "ffn" not in given else 512
        dimensions["layers"] = min(most, max(1, 4 + round((size - some) / a_layer)))
    if "ffn" not in given and abs(bytes_of() / size - 1) > 0.02:
        step = BLOCKS[type][0]
        a_step = bytes_of(ffn=2 * step) - bytes_of(ffn=step)
        dimensions["ffn"] = max(1, round((size - bytes_of(ffn=step)) / a_step) + 1) * step
    if abs(bytes_of() / size - 1) > 0.05:
        raise ValueError(
            f"expected dimensions that can make {size:,} bytes, found that {architecture.name} with "
            f"{dimensions} makes {bytes_of():,}: give fewer of them, or other ones"
        )
    return architecture.resolve(dimensions)
