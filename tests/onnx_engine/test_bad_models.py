"""Model files that are missing, damaged or hostile: what is expected, what was found, and nothing left in
the cache.
"""

import random

import numpy as np
import onnx
import pytest
from made_encoders import Encoder, encoder_file, tokens
from onnx import TensorProto, helper, numpy_helper
from onnx_references import assert_same, stock_outputs

from edgeinfer.budget import process_memory
from edgeinfer.engines.onnx import open_onnx
from edgeinfer.errors import BudgetError, EdgeInferError, ModelFileError
from edgeinfer.onnx.graph import read_onnx
from edgeinfer.onnx.wire import encode

TINY = Encoder(layers=1, width=128, ffn=256)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return encoder_file(folder, TINY)


def change_entry(path, key, value):
    """Rewrites a key of the first external tensor."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
    onnx.save_model(model, path)
    return tensor.name


def test_what_is_not_there(tmp_path):
    with pytest.raises(ModelFileError, match="missing.onnx cannot be read: No such file"):
        open_onnx(tmp_path / "missing.onnx")
    with pytest.raises(ModelFileError, match="is a folder: expected an .onnx file"):
        open_onnx(tmp_path)


@pytest.mark.parametrize(
    "content", [b"GGUF" * 100, b"{}", b"\x08\x09", b"\x0a\xff\xff\xff\xff\x7f", b"\x00" * 64]
)
def test_what_is_no_model(tmp_path, content):
    path = tmp_path / "no.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is not an ONNX model"):
        open_onnx(path)


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.onnx"
    path.touch()
    with pytest.raises(ModelFileError, match="is empty: expected an ONNX model"):
        open_onnx(path)


def test_cut_short_anywhere(encoder, tmp_path):
    whole = encoder.read_bytes()
    short = encoder.with_name("short.onnx")
    for length in range(1, len(whole), len(whole) // 40):
        short.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            open_onnx(short)


def test_external_data_that_is_missing(encoder):
    encoder.with_name(encoder.name + ".data").unlink()
    with pytest.raises(
        ModelFileError, match=r"encoder.onnx.data is missing: tensor 'embedding' of encoder.onnx is in it"
    ):
        open_onnx(encoder)


def test_external_data_that_is_short(encoder):
    data = encoder.with_name(encoder.name + ".data")
    size = data.stat().st_size
    with open(data, "r+b") as file:
        file.truncate(size - 8192)
    with pytest.raises(
        ModelFileError, match=rf"is too short: tensor '.*' needs bytes \d+ to \d+, the file has {size - 8192}"
    ):
        open_onnx(encoder)


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:/secret", ""]
)
def test_external_data_outside_the_folder(encoder, location):
    (encoder.parent.parent / "secret").write_bytes(bytes(10_000_000))
    name = change_entry(encoder, "location", location)
    with pytest.raises(
        ModelFileError, match=f"tensor '{name}' wants its data from .* not a file inside the model's folder"
    ):
        open_onnx(encoder)


def test_a_link_out_of_the_folder(encoder):
    data = encoder.with_name(encoder.name + ".data")
    outside = encoder.parent.parent / "outside"
    data.rename(outside)
    data.symlink_to(outside)
    with pytest.raises(ModelFileError, match="a link to .*outside, outside the model's folder"):
        open_onnx(encoder)


def test_links_into_one_folder_are_as_downloads_leave_them(encoder, tmp_path):
    """A cache of downloads keeps blobs in one folder and links to them, the model's too, in another."""
    links = tmp_path / "snapshots"
    links.mkdir()
    for path in list(encoder.parent.iterdir()):
        (links / path.name).symlink_to(path)
    with open_onnx(links / encoder.name) as model:
        assert_same(model.run(tokens(1)), stock_outputs(encoder, tokens(1)))


@pytest.mark.parametrize(
    "key, value", [("offset", "-1"), ("offset", "x"), ("length", "5"), ("length", "99999999999")]
)
def test_external_data_that_cannot_be(encoder, key, value):
    change_entry(encoder, key, value)
    with pytest.raises(
        ModelFileError, match="expected .* bytes of external data at an offset of 0 or more, found"
    ):
        open_onnx(encoder)


def test_bytes_that_do_not_fit_the_shape(tmp_path):
    tensor = numpy_helper.from_array(np.zeros((3, 4), np.float32), "weight")
    tensor.dims[0] = 5
    path = save_product(tmp_path, tensor)
    with pytest.raises(ModelFileError, match=r"'weight': expected 80 bytes for float32 \[5, 4\], found 48"):
        open_onnx(path)


def save_product(folder, weight, domain="", kind="MatMul"):
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("x", "y")]
    nodes = [helper.make_node(kind, ["x", weight.name], ["y"], domain=domain)]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight])
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path = folder / "product.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("domain, kind", [("", "MatMull"), ("com.nobody", "Product")])
def test_an_unknown_operator_is_named(tmp_path, domain, kind):
    path = save_product(
        tmp_path, numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight"), domain, kind
    )
    with pytest.raises(ModelFileError, match=f"ONNX Runtime refused {path}: .*{kind}"):
        open_onnx(path)


@pytest.mark.parametrize("name, damaged", [(b"MatMul", b"Mat\x8eul"), (b"x", b"\x8e")])
@pytest.mark.parametrize("room", [None, 50 << 20], ids=["one session", "prepared"])
def test_names_that_are_no_text_are_refused_and_standard_output_stays_clean(tmp_path, capfd, room, name, damaged):
    """ONNX Runtime would say on standard output, where results go, that it tries the same again."""
    weight = numpy_helper.from_array(np.zeros((5000, 5000), np.float32), "weight")
    path = save_product(tmp_path, weight, "", "MatMul")
    path.write_bytes(path.read_bytes().replace(name, damaged))
    with pytest.raises(ModelFileError, match=f"ONNX Runtime refused {path}"):
        open_onnx(path, memory=room and process_memory().rss_bytes + room)
    assert capfd.readouterr().out == ""


def test_nothing_is_left_in_the_cache_after_a_failure(tmp_path, cache):
    """An operator that nobody knows, found when the model is prepared."""
    pytest.importorskip("edgeinfer._native", reason="needs the C extension")
    weight = numpy_helper.from_array(np.zeros((5000, 5000), np.float32), "weight")
    path = save_product(tmp_path, weight, "com.nobody", "Product")
    with pytest.raises(ModelFileError, match="Product"):
        open_onnx(path, memory=process_memory().rss_bytes + (50 << 20))
    assert not list((cache / "edgeinfer" / "onnx").iterdir())


def test_nothing_is_prepared_for_a_budget_that_the_process_fills(tmp_path, cache):
    pytest.importorskip("edgeinfer._native", reason="needs the C extension")
    weight = numpy_helper.from_array(np.zeros((64, 64), np.float32), "weight")
    path = save_product(tmp_path, weight, "", "MatMul")
    with pytest.raises(BudgetError, match="the smallest that works is above the .* --memory"):
        open_onnx(path, memory="10MiB")
    assert not list((cache / "edgeinfer" / "onnx").iterdir())


def test_damaged_files_never_escape(encoder):
    """Random damage: read, or refused in edgeinfer's words."""
    whole = encoder.read_bytes()
    choice = random.Random(0)
    damaged = encoder.with_name("damaged.onnx")
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(choice.randint(1, 8)):
            content[choice.randrange(len(content))] = choice.randrange(256)
        damaged.write_bytes(content)
        try:
            read_onnx(damaged)
        except EdgeInferError:
            refused += 1
    assert refused > 30


def test_graphs_that_lie_too_deep(tmp_path):
    payload = b""
    for _ in range(1000):  # graph in attribute in node in graph ...
        payload = encode(1, encode(5, encode(6, payload)))
    (tmp_path / "deep.onnx").write_bytes(encode(7, payload))
    with pytest.raises(ModelFileError, match="deep in each other"):
        open_onnx(tmp_path / "deep.onnx")
