"""Random models with branches, residuals, shared weights, subgraphs: the same seed gives the same one."""

import random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 160  # a matrix of this is large enough to be mapped


class RandomGraph:
    """Builds a model over values of shape [rows, WIDTH]."""

    def __init__(self, seed):
        self._choice = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self.nodes, self.weights, self.extra_inputs = [], [], []
        self.values = ["x"]
        self._count = 0

    def build(self, num_nodes):
        makers = (
            self.product,
            self.product,
            self.residual,
            self.residual,
            self.activation,
            self.norm,
            self.halves,
            self.shared_product,
            self.constant_product,
            self.branch,
            self.loop,
            self.default,
        )
        for _ in range(num_nodes):
            self._choice.choice(makers)()
        outputs = [self.values[-1], *self._choice.sample(self.values, 2)]
        matrices = [weight.name for weight in self.weights if len(weight.dims) == 2]
        if self._choice.random() < 0.5 and matrices:  # a weight that is an output as well
            outputs.append(self._choice.choice(matrices))
        if self._choice.random() < 0.3:
            outputs.append("x")
        return self._model(dict.fromkeys(outputs))

    def _model(self, outputs):
        renamed = [
            helper.make_node("Identity", [name], [f"out.{number}"])
            for number, name in enumerate(outputs)
            if name == "x"
        ]
        names = [f"out.{number}" if name == "x" else name for number, name in enumerate(outputs)]
        shape = ["rows", WIDTH]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), *self.extra_inputs]
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in names]
        graph = helper.make_graph([*self.nodes, *renamed], "random", inputs, ports, self.weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def _name(self, kind):
        self._count += 1
        return f"{kind}.{self._count}"

    def _node(self, kind, *inputs, outputs=1, **attributes):
        names = [self._name(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def _value(self):
        """Mostly a late one, so that the graph is deep; sometimes any."""
        return self._choice.choice(self.values if self._choice.random() < 0.3 else self.values[-3:])

    def _array(self, rows=WIDTH, columns=WIDTH):
        return (self._numbers.standard_normal((rows, columns)) / WIDTH**0.5).astype(np.float32)

    def _weight(self, rows=WIDTH, columns=WIDTH):
        name = self._name("weight")
        self.weights.append(numpy_helper.from_array(self._array(rows, columns), name))
        return name

    def product(self):
        self.values += self._node("MatMul", self._value(), self._weight())

    def shared_product(self):
        squares = [weight.name for weight in self.weights if tuple(weight.dims) == (WIDTH, WIDTH)]
        weight = self._choice.choice(squares) if squares else self._weight()
        self.values += self._node("MatMul", self._value(), weight)

    def constant_product(self):
        (weight,) = self._node("Constant", value=numpy_helper.from_array(self._array()))
        self.values += self._node("MatMul", self._value(), weight)

    def residual(self):
        self.values += self._node("Add", self._value(), self._choice.choice(self.values))

    def activation(self):
        self.values += self._node(self._choice.choice(("Relu", "Tanh", "Sigmoid")), self._value())

    def norm(self):
        scale = self._name("scale")
        self.weights.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), scale))
        self.values += self._node("LayerNormalization", self._value(), scale)

    def halves(self):
        """Two narrow branches that meet again."""
        one, two = self._node("Split", self._value(), outputs=2, axis=1)
        one = self._node("MatMul", one, self._weight(WIDTH // 2, WIDTH))
        two = self._node("MatMul", two, self._weight(WIDTH // 2, WIDTH))
        self.values += self._node("Mul", *one, *two)

    def branch(self):
        """An If whose branches take a value and a weight from around them."""
        value, weight = self._value(), self._weight()
        (total,) = self._node("ReduceSum", value, keepdims=0)
        zero = self._name("zero")
        self.weights.append(numpy_helper.from_array(np.float32(0), zero))
        (positive,) = self._node("Greater", total, zero)
        branches = {}
        for name, kind in (("then_branch", "MatMul"), ("else_branch", "Add")):
            inner = self._name("inner")
            if kind == "MatMul":
                node = helper.make_node("MatMul", [value, weight], [inner])
            else:
                node = helper.make_node("Add", [value, self._choice.choice(self.values)], [inner])
            port = helper.make_tensor_value_info(inner, TensorProto.FLOAT, [None, None])
            branches[name] = helper.make_graph([node], name, [], [port])
        self.values += self._node("If", positive, **branches)

    def loop(self):
        """A Loop of two rounds over a value, with a weight from around it."""
        weight, body = self._weight(), self._name("body")
        trips, go_on = self._name("trips"), self._name("go_on")
        self.weights.append(numpy_helper.from_array(np.int64(2), trips))
        self.weights.append(numpy_helper.from_array(np.bool_(True), go_on))
        names = {part: f"{body}.{part}" for part in ("number", "go", "state", "product", "next", "same")}
        nodes = [
            helper.make_node("MatMul", [names["state"], weight], [names["product"]]),
            helper.make_node("Tanh", [names["product"]], [names["next"]]),
            helper.make_node("Identity", [names["go"]], [names["same"]]),
        ]
        inputs = [
            helper.make_tensor_value_info(names["number"], TensorProto.INT64, []),
            helper.make_tensor_value_info(names["go"], TensorProto.BOOL, []),
            helper.make_tensor_value_info(names["state"], TensorProto.FLOAT, [None, None]),
        ]
        outputs = [
            helper.make_tensor_value_info(names["same"], TensorProto.BOOL, []),
            helper.make_tensor_value_info(names["next"], TensorProto.FLOAT, [None, None]),
        ]
        graph = helper.make_graph(nodes, body, inputs, outputs)
        self.values += self._node("Loop", trips, go_on, self._value(), body=graph)

    def default(self):
        """An input with a default value: a weight that is no constant."""
        weight = self._weight()
        self.extra_inputs.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, [WIDTH, WIDTH]))
        self.values += self._node("MatMul", self._value(), weight)


def write_random_model(path, seed, num_nodes=16):
    """A random model at `path`; with odd seeds its weights lie beside it."""
    model = RandomGraph(seed).build(num_nodes)
    onnx.checker.check_model(model)
    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 1024}
    onnx.save_model(model, path, **(options if seed % 2 else {}))
    return path
