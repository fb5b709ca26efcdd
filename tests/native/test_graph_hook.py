"""The graph hook without llama.cpp: a small ggml stands in, and nodes are asked about by hand."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import PAGE, RESIDENT, ROWS, STREAMED, Paged, write_random
from compiler import HERE, build_library

from edgeinfer import _native

FUNCTIONS = (
    "init free new_tensor_1d new_tensor_2d new_tensor_3d mul_mat_id get_rows view_1d reshape_1d permute "
    "transpose op_name set_name set_input tensor_overhead"
).split()
NONE, GET_ROWS, MUL_MAT_ID, VIEW = 0, 1, 2, 3  # of fake_ggml.c


class Tensor(ctypes.Structure):
    """struct ggml_tensor"""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def tensor(
    name: str = "", op: int = NONE, sources: tuple = (), data: int = 0, view: Tensor | None = None
) -> Tensor:
    made = Tensor(op=op, data=data, name=name.encode())
    for i, source in enumerate(sources):
        made.src[i] = ctypes.pointer(source)
    if view is not None:
        made.view_src = ctypes.pointer(view)
    return made


def addresses(library: ctypes.CDLL) -> dict[str, int]:
    pairs = ((f"ggml_{name}", getattr(library, f"fake_{name}")) for name in FUNCTIONS)
    return {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in pairs}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("ggml")


@pytest.fixture(scope="module")
def functions(directory):
    return addresses(ctypes.CDLL(str(build_library(HERE / "fake_ggml.c", directory / "fake.so"))))


# ---- the check -----------------------------------------------------------------------------------


def test_the_loaded_llama_cpp_is_as_it_is_known():
    pytest.importorskip("llama_cpp")
    from edgeinfer.engines.paging import make_hook

    hook = make_hook()
    assert hook.evaluate_address and hook.abort_address and hook.data_address
    assert hook.halted is False


def test_a_ggml_with_the_same_structures_is_accepted(functions):
    assert _native.Hook(functions).records() == []


@pytest.mark.parametrize(
    "change, difference",
    [
        ("LONGER", "the size of struct ggml_tensor"),
        ("NARROW_NE", "field ne"),
        ("OP_AFTER_FLAGS", "field flags"),
        ("MORE_SOURCES", "field data"),
        ("VIEW_OFFSET_FIRST", "fields view_src and view_offs"),
        ("NUMBER_BEFORE_DATA", "field data"),
        ("NAME_BEFORE_DATA", "field data"),
        ("OTHER_NAMES", "operation GET_ROWS"),
        ("NO_CONTEXT", "ggml_init"),
    ],
)
def test_a_ggml_with_other_structures_is_refused(directory, change, difference):
    """In a process of its own, which a check that follows a wrong pointer would end."""
    library = build_library(HERE / "fake_ggml.c", directory / f"{change}.so", f"-D{change}")
    code = (
        "import ctypes, sys; from edgeinfer import _native; from test_graph_hook import addresses\n"
        "try: _native.Hook(addresses(ctypes.CDLL(sys.argv[1])))\n"
        "except RuntimeError as error: print(error)"
    )
    script = directory / f"{change}.py"
    script.write_text(f"import sys; sys.path.append({str(HERE)!r})\n" + code)
    done = subprocess.run(
        [sys.executable, str(script), str(library)], capture_output=True, text=True, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"llama.cpp's tensors differ from what is known here: {difference}\n"


@pytest.mark.parametrize("name", [f"ggml_{name}" for name in FUNCTIONS])
def test_a_function_that_is_missing(functions, name):
    known = {other: address for other, address in functions.items() if other != name}
    with pytest.raises(KeyError, match=f"expected the address of {name}"):
        _native.Hook(known)


@pytest.mark.parametrize("address", [0, 4096, -1, 2**63])
def test_an_address_that_is_in_no_library(functions, address):
    message = f"expected the address of ggml_init, got {address}, which lies in no loaded library"
    with pytest.raises(ValueError, match=message):
        _native.Hook({**functions, "ggml_init": address})


@pytest.mark.parametrize("address, error", [(None, TypeError), ("x", TypeError), (2**64, OverflowError)])
def test_an_address_that_is_none(functions, address, error):
    with pytest.raises(error):
        _native.Hook({**functions, "ggml_transpose": address})


# ---- passes --------------------------------------------------------------------------------------


class Model:
    """Three weights: two streamed, one resident; a table; and the nodes that use them."""

    def __init__(self, path: Path, functions: dict[str, int]):
        write_random(path, 30 * PAGE)
        blocks = [
            (STREAMED, 100, 2 * PAGE),
            (RESIDENT, 5 * PAGE, PAGE),
            (STREAMED, 9 * PAGE, PAGE + 7),
            (ROWS, 20 * PAGE, 4 * PAGE),
        ]
        self.paged = Paged(path, blocks, [0, 1, 2], ring=8 * PAGE)
        base = self.paged.space.address
        self.homes = [base + offset for _, offset, _ in blocks]
        names = ("first", "second", "third", "table")
        self.weights = [tensor(name, data=home) for name, home in zip(names, self.homes)]
        self.input = tensor("input", data=16)
        self.nodes = [tensor(op=MUL_MAT_ID, sources=(weight, self.input)) for weight in self.weights[:3]]
        self.hook = _native.Hook(functions)
        self.hook.set_ranges([(base, base + 30 * PAGE)])
        evaluate = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
        self._evaluate = evaluate(self.hook.evaluate_address)
        self._abort = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(self.hook.abort_address)

    def bind(self) -> None:
        rows = [
            (ctypes.addressof(weight), home, number, number in (0, 2), False)
            for number, (weight, home) in enumerate(zip(self.weights[:3], self.homes))
        ]
        self.hook.bind(
            self.paged.pager, [*rows, (ctypes.addressof(self.weights[3]), self.homes[3], -1, False, True)]
        )

    def ask(self, node: Tensor) -> bool:
        return self._evaluate(ctypes.addressof(node), True, self.hook.data_address)

    def computed(self, node: Tensor) -> bool:
        return self._evaluate(ctypes.addressof(node), False, self.hook.data_address)

    def should_abort(self) -> bool:
        return self._abort(self.hook.data_address)

    def close(self) -> None:
        self.hook.unbind()
        self.paged.pager.close()


@pytest.fixture
def model(tmp_path, functions):
    model = Model(tmp_path / "weights.bin", functions)
    yield model
    model.close()


def begin(model: Model) -> None:
    model.paged.pager.begin_pass()
    model.hook.begin_pass()


def test_recording_shows_every_use_in_order(model):
    view = tensor(op=VIEW, sources=(model.weights[1],), data=model.homes[1] + 64, view=model.weights[1])
    lookup = tensor(op=GET_ROWS, sources=(model.weights[3], model.input))
    nodes = [lookup, model.nodes[2], view, tensor(op=MUL_MAT_ID, sources=(view, model.weights[0]))]
    model.hook.record(True)
    model.hook.begin_pass()
    assert [model.ask(node) for node in nodes] == [False] * 4
    assert model.should_abort()
    model.hook.end_pass()
    model.hook.record(False)
    assert not model.should_abort()
    shown = [(name, node, rows, view) for _, _, name, _, node, rows, view, _ in model.hook.records()]
    assert shown == [
        ("table", 1, True, False),
        ("third", 2, False, False),
        ("second", 3, False, True),
        ("second", 4, False, True),
        ("first", 4, False, False),
    ]
    assert {record[0] for record in model.hook.records()} == {
        ctypes.addressof(weight) for weight in model.weights
    }


def test_a_streamed_weight_is_present_between_ask_and_computed(model):
    model.bind()
    for _ in range(3):
        begin(model)
        for number, node in enumerate(model.nodes):
            stop = model.ask(node)
            weight = model.weights[number]
            assert ctypes.string_at(weight.data, model.paged.blocks[number][2]) == model.paged.wanted(number)
            assert (weight.data == model.homes[number]) == (number == 1)
            assert stop or number == 1  # streamed weights are given back behind their node
            if stop:
                assert model.computed(node)
            assert weight.data == model.homes[number]
        model.hook.end_pass()
        model.paged.pager.end_pass()
    assert model.paged.pager.statistics()["reorders"] == 0


def test_a_table_that_is_looked_up_needs_no_block(model):
    model.bind()
    begin(model)
    lookup = tensor(op=GET_ROWS, sources=(model.weights[3], model.input))
    assert model.ask(lookup) and lookup.op == GET_ROWS  # the first run ends behind the first node
    assert not model.should_abort()


def refused(model: Model, node: Tensor, message: str) -> None:
    op = node.op
    begin(model)
    assert model.ask(node) and node.op == NONE  # not computed
    assert model.should_abort()
    assert not model.computed(node)
    model.hook.end_pass()
    assert node.op == op
    with pytest.raises(OSError, match=message):
        model.paged.pager.end_pass()


def test_a_weight_that_was_never_seen_is_not_computed_with(model):
    model.bind()
    unknown = tensor("blk.7.new", data=model.homes[0] + 640)
    node = tensor(op=MUL_MAT_ID, sources=(unknown, model.input))
    refused(model, node, "weight blk.7.new is used that was not seen when the model was loaded")


def test_a_view_of_a_streamed_weight_is_not_computed_with(model):
    model.bind()
    view = tensor(op=VIEW, sources=(model.weights[0],), data=model.homes[0] + 64, view=model.weights[0])
    node = tensor(op=MUL_MAT_ID, sources=(view, model.input))
    refused(model, node, "weight first is used in a way that was not seen when the model was loaded")


def test_a_table_that_is_multiplied_is_not_computed_with(model):
    model.bind()
    node = tensor(op=MUL_MAT_ID, sources=(model.weights[3], model.input))
    refused(model, node, "weight table is used in a way that was not seen")


def test_a_halted_pass_computes_no_node_that_is_asked_about_later(model):
    """llama.cpp goes on with the next part of a graph of several parts."""
    model.bind()
    begin(model)
    model.paged.pager.abort()
    for node in model.nodes:
        assert model.ask(node) and node.op == NONE
        assert not model.computed(node)
    model.hook.end_pass()
    assert [node.op for node in model.nodes] == [MUL_MAT_ID] * 3
    assert [weight.data for weight in model.weights] == model.homes
    begin(model)
    assert model.ask(model.nodes[0]) and model.nodes[0].op == MUL_MAT_ID
    model.hook.end_pass()


def test_a_pass_that_ends_early_gives_its_weights_back(model):
    model.bind()
    begin(model)
    model.ask(model.nodes[0])
    assert model.weights[0].data != model.homes[0]
    model.hook.end_pass()
    assert model.weights[0].data == model.homes[0]


def test_interrupting_is_seen_by_the_abort_callback(model):
    assert not model.should_abort() and model.hook.halted is False
    model.hook.interrupt(True)
    assert model.should_abort() and model.hook.halted is True
    model.hook.interrupt(False)
    assert not model.should_abort()


def test_a_weight_whose_block_is_in_no_order(tmp_path, functions):
    model = Model(tmp_path / "weights.bin", functions)
    model.paged = Paged(tmp_path / "weights.bin", model.paged.blocks, [], ring=8 * PAGE)
    model.bind()
    refused(model, model.nodes[0], "a block was asked for that is not in the order of use")
    model.close()


def test_a_bound_pager_stays_open(model):
    model.bind()
    model.bind()  # again
    with pytest.raises(RuntimeError, match="the pager is in use by 1 calls or hooks"):
        model.paged.pager.close()
    begin(model)
    assert model.ask(model.nodes[0])
    model.hook.end_pass()
    model.hook.unbind()
    model.hook.unbind()
    model.paged.pager.close()
    with pytest.raises(ValueError, match="the pager is closed"):
        model.bind()


def test_a_hook_that_goes_lets_its_pager_go(model, functions):
    hook = _native.Hook(functions)
    hook.bind(model.paged.pager, [])
    del hook
    model.paged.pager.close()


def test_what_cannot_be_bound(model):
    pager = model.paged.pager
    with pytest.raises(IndexError, match="expected a block below 4, got 4"):
        model.hook.bind(pager, [(1, 2, 4, True, False)])
    with pytest.raises(TypeError, match=r"expected a tuple \(tensor, home, block, streamed, rows, layer of experts, matrix\), got int"):
        model.hook.bind(pager, [7])
    with pytest.raises(OverflowError):
        model.hook.bind(pager, [(2**64, 2, 1, True, False)])
    with pytest.raises(TypeError):
        model.hook.bind(None, [])
    with pytest.raises(TypeError, match=r"expected a tuple \(start, end\), got int"):
        model.hook.set_ranges([7])
    with pytest.raises(OverflowError):
        model.hook.set_ranges([(0, 2**64)])
    pager.close()  # not bound
