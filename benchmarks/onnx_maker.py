"""Makes ONNX transformer encoders of any size with random weights, for measurements and tests only.

    python -m benchmarks.onnx_maker OUT.onnx --size 2GB [--bits 4]

Weights go to OUT.onnx.data, each on a page of its own. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.weights import CHUNK_BYTES, RandomStream
from edgeinfer.budget import parse_size

ALIGNMENT = 4096
BLOCK = 32  # weights that share a scale, in 4 bits
HEAD = 64
EPSILON = 1e-5


@dataclass(frozen=True)
class Encoder:
    """Layers that read [batch, sequence] token ids and give [batch, sequence, width] float32. `bits`: 32
    or 4.
    """

    layers: int
    width: int = 1024
    ffn: int = 4096
    vocabulary: int = 1000
    bits: int = 32
    seed: int = 0

    @classmethod
    def of_size(cls, nbytes: int, **options: int) -> Encoder:
        """As many layers as `nbytes` of weights hold, one at least."""
        one, two = (sum(weight.nbytes for weight in cls(layers, **options).weights()) for layers in (1, 2))
        return cls(1 + max(0, round((nbytes - one) / (two - one))), **options)

    def weights(self) -> Iterator[Weight]:
        """Every weight, in order of use."""
        yield Weight("embedding", (self.vocabulary, self.width), 1.0)
        for layer in range(self.layers):
            width, ffn = self.width, self.ffn
            yield from self._norm(f"{layer}.attention_norm")
            for name in ("query", "key", "value", "output"):
                yield from self._matrix(f"{layer}.{name}", width, width)
            yield from self._norm(f"{layer}.ffn_norm")
            yield from self._matrix(f"{layer}.up", width, ffn)
            yield from self._matrix(f"{layer}.down", ffn, width)
        yield from self._norm("final_norm")

    def _norm(self, name: str) -> Iterator[Weight]:
        yield Weight(f"{name}.scale", (self.width,), 0.0, mean=1.0)
        yield Weight(f"{name}.shift", (self.width,), 0.1)

    def _matrix(self, name: str, inputs: int, outputs: int) -> Iterator[Weight]:
        spread = inputs**-0.5
        if self.bits == 4:
            yield Weight(
                f"{name}.weight", (outputs, inputs // BLOCK, BLOCK // 2), 0.0, type=TensorProto.UINT8
            )
            yield Weight(f"{name}.scales", (outputs * inputs // BLOCK,), spread / 40, mean=spread / 5)
        else:
            yield Weight(f"{name}.weight", (inputs, outputs), spread)
        yield Weight(f"{name}.bias", (outputs,), 0.1)


@dataclass(frozen=True)
class Weight:
    """A tensor of values spread evenly, with the given standard deviation around `mean`; of random bits
    where uint8.
    """

    name: str
    shape: tuple[int, ...]
    spread: float
    mean: float = 0.0
    type: int = TensorProto.FLOAT

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * (1 if self.type == TensorProto.UINT8 else 4)

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        stream = RandomStream(seed, self.name)
        for start in range(0, self.nbytes, CHUNK_BYTES):
            raw = stream.bytes(min(CHUNK_BYTES, self.nbytes - start))
            if self.type == TensorProto.UINT8:
                yield raw
                continue
            bits = raw.view(np.uint32)
            bits >>= 9
            bits |= np.uint32(0x3F800000)  # 1 to 2
            values = bits.view(np.float32)
            values -= np.float32(1.5)
            values *= np.float32(self.spread * 12**0.5)
            values += np.float32(self.mean)
            yield values


def make_encoder(path: Path, encoder: Encoder) -> Path:
    """Write the model to `path` and its weights to `path`.data. Gives `path`."""
    data = path.with_name(path.name + ".data")
    initializers = []
    with open(data, "wb") as file:
        for weight in encoder.weights():
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(offset)
            for chunk in weight.chunks(encoder.seed):
                file.write(chunk.data)
            initializers.append(_external(weight, data.name, offset))
        file.truncate(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
    graph = _Graph(encoder).build(initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def _external(weight: Weight, location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=weight.name, data_type=weight.type, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class _Graph:
    """The nodes of an encoder whose norms come before attention and feed-forward."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[TensorProto] = []

    def build(self, initializers: list[TensorProto]) -> onnx.GraphProto:
        heads = self._encoder.width // HEAD
        self._constant("split", np.array([0, 0, heads, HEAD]))
        self._constant("merge", np.array([0, 0, self._encoder.width]))
        self._constant("scale", np.array(HEAD**-0.5, np.float32))
        x = self._node("Gather", "embedding", "tokens")
        for layer in range(self._encoder.layers):
            x = self._layer(str(layer), x)
        self._node(
            "LayerNormalization", x, "final_norm.scale", "final_norm.shift", output="hidden", epsilon=EPSILON
        )
        sizes = ["batch", "sequence"]
        return helper.make_graph(
            self._nodes,
            "encoder",
            [helper.make_tensor_value_info("tokens", TensorProto.INT64, sizes)],
            [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*sizes, self._encoder.width])],
            initializers + self._constants,
        )

    def _layer(self, name: str, x: str) -> str:
        width, ffn = self._encoder.width, self._encoder.ffn
        normed = self._norm(f"{name}.attention_norm", x)
        query, key, value = (
            self._heads(f"{name}.{kind}", normed, width) for kind in ("query", "key", "value")
        )
        key = self._node("Transpose", key, perm=[0, 2, 3, 1])
        query, value = (self._node("Transpose", part, perm=[0, 2, 1, 3]) for part in (query, value))
        scores = self._node("Mul", self._node("MatMul", query, key), "scale")
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), value)
        mixed = self._node("Reshape", self._node("Transpose", mixed, perm=[0, 2, 1, 3]), "merge")
        x = self._node("Add", x, self._product(f"{name}.output", mixed, width, width))
        hidden = self._product(f"{name}.up", self._norm(f"{name}.ffn_norm", x), width, ffn)
        return self._node("Add", x, self._product(f"{name}.down", self._node("Gelu", hidden), ffn, width))

    def _norm(self, name: str, x: str) -> str:
        return self._node("LayerNormalization", x, f"{name}.scale", f"{name}.shift", epsilon=EPSILON)

    def _heads(self, name: str, x: str, width: int) -> str:
        return self._node("Reshape", self._product(name, x, width, width), "split")

    def _product(self, name: str, x: str, inputs: int, outputs: int) -> str:
        if self._encoder.bits == 4:
            attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
            inputs_of = (x, f"{name}.weight", f"{name}.scales")
            product = self._node("MatMulNBits", *inputs_of, domain="com.microsoft", **attributes)
        else:
            product = self._node("MatMul", x, f"{name}.weight")
        return self._node("Add", product, f"{name}.bias")

    def _node(self, kind: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{kind}.{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(kind, inputs, [output], name=f"node.{len(self._nodes)}", **attributes)
        )
        return output

    def _constant(self, name: str, value: np.ndarray) -> None:
        self._constants.append(onnx.numpy_helper.from_array(value, name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx_maker", description=__doc__.splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="2GB", help="about so many bytes of weights")
    parser.add_argument("--bits", type=int, choices=(4, 32), default=32)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    options = {"width": args.width, "ffn": 4 * args.width, "bits": args.bits, "seed": args.seed}
    encoder = Encoder.of_size(parse_size(args.size), **options)
    make_encoder(args.out, encoder)
    print(f"{args.out}: {encoder.layers} layers, {sum(w.nbytes for w in encoder.weights()) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
