"""llama.cpp's graph nodes as Python sees them in an eval callback: their operation, shapes and values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import llama_cpp
import numpy as np

from edgeinfer.engines import ggml
from edgeinfer.errors import EngineError

_F32, _I32 = ggml.TYPE_NUMBERS["F32"], ggml.TYPE_NUMBERS["I32"]
EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Node(ctypes.Structure):
    """struct ggml_tensor of llama-cpp-python 0.3.36; `operations` checks that the library has the same."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # elements of each dimension, the row first
        ("nb", ctypes.c_size_t * 4),  # stride of each, in bytes
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]

    def source(self, i: int) -> Node:
        return Node.from_address(self.src[i])

    @property
    def is_float32(self) -> bool:
        return self.type == _F32

    @property
    def text_name(self) -> str:
        return self.name.decode("utf-8", "replace")


@dataclass(frozen=True)
class Operations:
    """The numbers that the loaded ggml has for what is looked at here."""

    mul_mat: int
    mul_mat_id: int


def values(node: Node) -> np.ndarray:
    """What a float32 or int32 node in memory holds, (ne[3], ..., ne[0]): its dimensions turned round; a view."""
    kinds = {_F32: np.float32, _I32: np.int32}
    if node.type not in kinds or not node.data:
        raise EngineError(f"The graph's node {node.text_name!r} is not in memory as float32 or int32.")
    extent = 4 + sum((size - 1) * stride for size, stride in zip(node.ne, node.nb))
    memory = (ctypes.c_char * extent).from_address(node.data)
    return np.ndarray(tuple(node.ne)[::-1], kinds[node.type], memory, strides=tuple(node.nb)[::-1])


@cache
def operations() -> Operations:
    """Check on a small graph that `Node` is the library's struct ggml_tensor. Raises EngineError if it is not."""
    context = ggml.init(ggml.InitParams(1 << 20, None, False))
    if not context:
        raise MemoryError("no memory to look at ggml's tensors")
    try:
        experts = ggml.new_tensor_3d(context, _F32, 32, 5, 7)
        vectors = ggml.new_tensor_3d(context, _F32, 32, 2, 3)
        ids = ggml.new_tensor_2d(context, _I32, 2, 3)
        matrix = ggml.new_tensor_2d(context, _F32, 32, 5)
        ggml.set_name(experts, b"edgeinfer.name")
        routed = Node.from_address(ggml.mul_mat_id(context, experts, vectors, ids))
        product = Node.from_address(ggml.mul_mat(context, matrix, vectors))
        weights = Node.from_address(experts)
        same = (
            (weights.type, tuple(weights.ne), tuple(weights.nb)) == (_F32, (32, 5, 7, 1), (4, 128, 640, 4480))
            and Node.from_address(ids).type == _I32
            and weights.data == ggml.get_data(experts)
            and weights.name == b"edgeinfer.name"
            and tuple(routed.src[:4]) == (experts, vectors, ids, None)
            and tuple(product.src[:3]) == (matrix, vectors, None)
            and _op_name(routed.op) == "MUL_MAT_ID"
            and _op_name(product.op) == "MUL_MAT"
        )
        if not same:
            raise EngineError(
                f"The tensors of this llama.cpp ({llama_cpp.__version__}) are not laid out as edgeinfer reads them. "
                "Install llama-cpp-python 0.3.36 or a later 0.3."
            )
        return Operations(mul_mat=product.op, mul_mat_id=routed.op)
    finally:
        ggml.free(context)


def _op_name(number: int) -> str:
    return ggml.op_name(number).decode() if 0 <= number < 64 else ""


class Tap:
    """An eval callback that calls `visit(node, ids)` for each node that `wants(node)`, once it is computed.

    `ids` is the node with the experts that a MUL_MAT_ID uses. The tap can stand before another callback, as
    the one that streams weights; it is silent until `active`. What is raised in a callback is lost to Python:
    it is kept, the pass computes nothing more that matters, and `check`, called after each pass, raises it.
    Keep the object for as long as the context.
    """

    def __init__(self, wants: Callable[[Node], bool], visit: Callable[[Node, Node | None], object]):
        self.active = False
        self._wants, self._visit = wants, visit
        self._raised: BaseException | None = None
        self._callback = EvalCallback(self._call)
        self._inner: Callable[[int, bool], bool] | None = None
        self._wanted: tuple[int, Node | None] | None = None  # asked for and not yet computed

    def wrap(self, callbacks: dict[str, int]) -> dict[str, int]:
        """The callbacks of a context (LlamaContext's `cb_eval`, ...) with this tap before them."""
        self._inner = None
        if callbacks.get("cb_eval"):
            inner, data = EvalCallback(callbacks["cb_eval"]), callbacks.get("cb_data")
            self._inner = lambda node, ask: inner(node, ask, data)
        return {**callbacks, "cb_eval": ctypes.cast(self._callback, ctypes.c_void_p).value}

    def _call(self, address: int, ask: bool, _data: object) -> bool:
        try:
            if (
                ask
                and self.active
                and self._raised is None
                and self._wants(node := Node.from_address(address))
            ):
                # The callback behind this one may exchange the ids for slot numbers.
                self._wanted = address, node.source(2) if node.src[2] else None
            elif not ask and self._wanted is not None and self._wanted[0] == address:
                (_, ids), self._wanted = self._wanted, None
                self._visit(Node.from_address(address), ids)
        except BaseException as error:
            self._raised = error
        stops = self._inner(address, ask) if self._inner is not None else not ask
        return stops or (ask and self._wanted is not None)

    def check(self) -> None:
        raised, self._raised, self._wanted = self._raised, None, None
        if raised is not None:
            raise raised
