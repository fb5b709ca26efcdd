"""GGUF files quantized by llama.cpp in a child process: every type, what is refused, what failures leave."""

import os
import resource
import signal
import time
from types import SimpleNamespace

import gguf
import numpy as np
import psutil
import pytest

from edgeinfer.engines.ggml import BLOCKS
from edgeinfer.errors import ExportError
from edgeinfer.exporters.importance import Importance
from edgeinfer.exporters.output import Target
from edgeinfer.exporters.quant_types import (
    QUANT_TYPES,
    TENSOR_TYPES,
    find_type,
    needs_importance,
    quantized_bytes,
)
from edgeinfer.exporters.quantize import planned_types, quantize_gguf
from edgeinfer.modelfile import read_model_file
from tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def source(folder):
    return tiny_model(folder, "llama", "F32", layers=1)


@pytest.fixture(scope="module")
def importance(source):
    return made_importance(source)


def made_importance(source):
    """Not gathered: every column of every matrix with another weight."""
    rng = np.random.default_rng(0)
    matrices = [tensor for tensor in read_model_file(source).tensors if len(tensor.shape) > 1]
    sums = {t.name: rng.uniform(0.1, 4, (1, t.shape[0])).astype(np.float32) for t in matrices}
    return Importance(sums, {name: np.array([1]) for name in sums}, 1, 512, "made.gguf")


def weights(path):
    """tensor -> float32 values, by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float32).reshape(t.shape[::-1])
        for t in reader.tensors
    }


#: The largest relative error of normal weights, by bits a weight. Ternary types are for other matrices.
ERRORS = (
    (1.3, 0.75),
    (1.9, 0.62),
    (2.7, 0.45),
    (3.6, 0.27),
    (4.8, 0.13),
    (6, 0.07),
    (7, 0.035),
    (9, 0.012),
    (33, 3e-3),
)
TERNARY = {"TQ1_0": 0.75, "TQ2_0": 0.75}
NOT_IN_GGUF_PACKAGE = ("Q1_0", "Q2_0")
#: Their tables take seconds; those of IQ1_S and IQ2_M are the same.
SLOW_TWINS = ("IQ1_M", "IQ2_S")


@pytest.mark.parametrize("type", [t for t in QUANT_TYPES if t not in NOT_IN_GGUF_PACKAGE + SLOW_TWINS])
def test_every_type_is_what_it_says(folder, tmp_path, type):
    # Small, with rows of 256 and of 32: some types take 20 microseconds a weight.
    source = tiny_model(folder, "llama", "F32", layers=1, ffn=32, tied=True, heads=4, kv_heads=2, head_size=16)
    target = tmp_path / "out.gguf"
    report = quantize_gguf(source, target, type, importance=made_importance(source))
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    assert report.tensors == found and report.type == type
    assert report.target_bytes == target.stat().st_size <= quantized_bytes(read_model_file(source), found)
    before, after = weights(source), weights(target)
    for name, values in before.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[found[name]]]
        limit = next(error for bits, error in ERRORS if block_bytes * 8 / block < bits)
        limit = TERNARY.get(found[name], limit)
        assert np.linalg.norm(after[name] - values) <= limit * np.linalg.norm(values), (name, found[name])


@pytest.mark.parametrize("type, bits", [("Q1_0", 1.125), ("Q2_0", 2.25)])
def test_types_that_the_gguf_package_does_not_know(source, tmp_path, type, bits):
    report = quantize_gguf(source, tmp_path / "out.gguf", type)
    assert (
        report.tensors["blk.0.ffn_up.weight"] == type
        and BLOCKS[type].block_bytes * 8 / BLOCKS[type].block_size == bits
    )


def test_the_list_of_types_is_llama_cpps():
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_K_M", "IQ1_S", "TQ2_0", "MXFP4_MOE"} <= set(QUANT_TYPES)
    assert QUANT_TYPES["Q4_K_M"] == 15 and "GUESSED" not in QUANT_TYPES
    assert find_type("q4_k") == "Q4_K_M" and find_type("iq4_nl") == "IQ4_NL"


def test_an_unknown_type_is_answered_with_the_known_ones(source, tmp_path):
    with pytest.raises(
        ExportError, match=r"type 'Q4_X' is unknown. Expected one of F32, F16, .*Q4_K_M.*IQ1_M"
    ):
        quantize_gguf(source, tmp_path / "out.gguf", "Q4_X")
    assert list(tmp_path.iterdir()) == []


def test_single_tensors_have_their_own_types(source, tmp_path):
    wanted = {"token_embd.weight": "Q4_0", "blk.0.ffn_down.weight": "IQ4_XS", "blk.0.attn_q.weight": "F32"}
    target = tmp_path / "out.gguf"
    report = quantize_gguf(source, target, "Q6_K", tensor_types=wanted)
    assert {name: report.tensors[name] for name in wanted} == wanted
    assert report.tensors["blk.0.attn_k.weight"] == "Q6_K"
    same = weights(target)["blk.0.attn_q.weight"] == weights(source)["blk.0.attn_q.weight"]
    assert same.all()


@pytest.mark.parametrize(
    "types, words",
    [
        ({"blk.9.ffn_up.weight": "Q8_0"}, "has no tensor 'blk.9.ffn_up.weight'"),
        ({"blk.0.ffn_up.weight": "Q4_K_M"}, "the type 'Q4_K_M' is unknown. Expected one of .*Q4_K, "),
        ({"blk.0.ffn_up.weight": "I32"}, "the type 'I32' is unknown"),
    ],
)
def test_wrong_types_of_single_tensors_are_named(source, tmp_path, types, words):
    with pytest.raises(ExportError, match=words):
        quantize_gguf(source, tmp_path / "out.gguf", "Q8_0", tensor_types=types)
    with pytest.raises(ExportError, match="Types of single tensors are ignored where all become F16"):
        quantize_gguf(source, tmp_path / "out.gguf", "F16", tensor_types={"blk.0.ffn_up.weight": "Q8_0"})


def test_rows_that_a_type_cannot_divide(folder, tmp_path):
    narrow = tiny_model(folder, "llama", "F16", layers=1, ffn=320)
    with pytest.raises(
        ExportError, match="rows of 320 elements are not a multiple of 256, the block size of Q4_K"
    ):
        quantize_gguf(narrow, tmp_path / "out.gguf", "Q4_K_M", tensor_types={"blk.0.ffn_down.weight": "Q4_K"})
    report = quantize_gguf(narrow, tmp_path / "out.gguf", "Q4_K_M")
    assert report.tensors["blk.0.ffn_down.weight"] == "Q8_0"  # llama.cpp's own stand-in for Q6_K


def test_what_would_be_written_is_known_before(source, importance):
    planned = planned_types(source, "IQ3_XXS", importance=importance)
    assert planned["blk.0.attn_q.weight"] == "IQ2_S" and planned["output_norm.weight"] == "F32"


@pytest.mark.parametrize("type", ["IQ2_XXS", "IQ1_M", "Q2_K_S", "IQ3_XXS"])
def test_types_that_need_an_importance_matrix_say_so_before_work(source, tmp_path, type):
    with pytest.raises(ExportError, match=f"{type} needs an importance matrix: .* --calibration"):
        with Target(tmp_path / "out.gguf") as part:
            quantize_gguf(source, part, type)
    assert list(tmp_path.iterdir()) == []


def test_a_matrix_that_lacks_a_tensor(source, importance, tmp_path):
    part = Importance({**importance.sums}, importance.counts, 1, 512, "half.gguf")
    del part.sums["blk.0.ffn_up.weight"]
    with pytest.raises(
        ExportError, match="IQ2_XS needs the importance of blk.0.ffn_up.weight, .* half.gguf does not"
    ):
        quantize_gguf(source, tmp_path / "out.gguf", "IQ2_XS", importance=part)
    report = quantize_gguf(source, tmp_path / "out.gguf", "Q4_K_M", importance=part)
    assert report.without_importance == ("blk.0.ffn_up.weight",)


def test_another_models_matrix_is_refused(source, importance, tmp_path):
    wide = {**importance.sums, "blk.0.ffn_up.weight": np.ones((1, 512), np.float32)}
    other = Importance(wide, importance.counts, 1, 512, "other.gguf")
    with pytest.raises(
        ExportError, match="512 values for blk.0.ffn_up.weight, the model needs 256: it is another"
    ):
        quantize_gguf(source, tmp_path / "out.gguf", "Q4_K_M", importance=other)
    stranger = Importance({"x": np.ones((1, 4))}, {"x": np.array([1])}, 1, 512, "stranger.gguf")
    with pytest.raises(ExportError, match="stranger.gguf names none of the tensors"):
        quantize_gguf(source, tmp_path / "out.gguf", "Q4_K_M", importance=stranger)


def test_importance_lessens_the_error_where_it_is_high(source, importance, tmp_path):
    """The errors, weighted by importance, are smaller with it than without."""
    name = "blk.0.ffn_up.weight"
    errors = {}
    for label, matrix in (("with", importance), ("without", None)):
        quantize_gguf(source, tmp_path / "out.gguf", "Q3_K_S", importance=matrix)
        difference = weights(tmp_path / "out.gguf")[name] - weights(source)[name]
        errors[label] = (np.square(difference) * importance.sums[name]).sum()
    assert errors["with"] < 0.95 * errors["without"]
    written = gguf.GGUFReader(tmp_path / "out.gguf")
    assert "quantize.imatrix.file" not in written.fields


def test_the_matrix_is_named_in_the_file(source, importance, tmp_path):
    quantize_gguf(source, tmp_path / "out.gguf", "Q4_K_M", importance=importance)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "made.gguf"
    assert fields["quantize.imatrix.entries_count"].contents() == len(importance.sums)


def test_quantized_models_are_refused_unless_asked(folder, tmp_path):
    model = tiny_model(folder, "llama", "Q8_0", layers=1)
    with pytest.raises(ExportError, match="is quantized already: .* is Q8_0. .*--requantize"):
        quantize_gguf(model, tmp_path / "out.gguf", "Q4_K_M")
    report = quantize_gguf(model, tmp_path / "out.gguf", "Q4_K_M", requantize=True)
    assert report.bits_per_weight < 6 < report.source_bits_per_weight


def test_a_page_aligned_source_gives_a_valid_file(folder, source, tmp_path):
    """llama.cpp keeps general.alignment and pads to 32 all the same."""
    aligned = tiny_model(folder, "llama", "F32", layers=1, alignment=4096)
    for path, name in ((aligned, "aligned.gguf"), (source, "plain.gguf")):
        quantize_gguf(path, tmp_path / name, "Q4_K_M")
    from_aligned, plain = weights(tmp_path / "aligned.gguf"), weights(tmp_path / "plain.gguf")
    assert all(np.array_equal(from_aligned[name], plain[name]) for name in plain)


def test_a_split_source(source, tmp_path):
    first, whole = _split(source, tmp_path), tmp_path / "whole.gguf"
    quantize_gguf(first, tmp_path / "out.gguf", "Q4_K_M")
    quantize_gguf(source, whole, "Q4_K_M")
    assert weights(tmp_path / "out.gguf").keys() == weights(whole).keys()
    assert all(
        np.array_equal(values, weights(whole)[name])
        for name, values in weights(tmp_path / "out.gguf").items()
    )
    assert "split.count" not in gguf.GGUFReader(tmp_path / "out.gguf").fields


def _split(source, folder):
    """The model as two parts, by the gguf package."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(folder / "parts.gguf", "llama", split_max_tensors=len(reader.tensors) // 2 + 1)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
        )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "parts-00001-of-00002.gguf"


def test_progress_rises_to_the_end(source, tmp_path):
    seen = []
    quantize_gguf(source, tmp_path / "out.gguf", "Q8_0", progress=seen.append)
    assert seen == sorted(seen) and len(seen) > 5 and seen[-1] == 1.0


def test_a_full_disk_is_explained_and_leaves_nothing(source, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(
            ExportError, match="disk is full, or the file would be too large for it: .*out.gguf"
        ):
            with Target(tmp_path / "out.gguf") as part:
                quantize_gguf(source, part, "Q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_known_before_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=100_000))
    with pytest.raises(ExportError, match=r"The disk is too full for .* takes .*, 97.7 KiB are free"):
        quantize_gguf(source, tmp_path / "out.gguf", "Q8_0")


def _children():
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_ends_the_child_and_leaves_nothing(source, tmp_path):
    running = []

    def press(_fraction):
        running.extend(_children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with Target(tmp_path / "out.gguf") as part:
            quantize_gguf(source, part, "Q8_0", progress=press)
    assert running and not any(child.is_running() for child in running)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_dies_is_reported(source, tmp_path):
    def end_it(_fraction):
        for child in _children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.05)

    with pytest.raises(ExportError, match="llama.cpp was ended by signal 9 while quantizing"):
        quantize_gguf(source, tmp_path / "out.gguf", "IQ4_XS", progress=end_it)


def test_llama_cpps_reason_is_in_the_error(source, tmp_path):
    broken = tmp_path / "broken.gguf"
    data = bytearray(source.read_bytes())
    tensor = read_model_file(source).tensor("blk.0.ffn_up.weight")
    data[tensor.offset : tensor.offset + 4] = np.float32(np.nan).tobytes()
    broken.write_bytes(data)
    with pytest.raises(
        ExportError, match="llama.cpp gave up while quantizing .*blk.0.ffn_up.weight.*invalid data"
    ):
        quantize_gguf(broken, tmp_path / "out.gguf", "Q4_K_M")


def test_which_tensors_need_importance():
    assert needs_importance("blk.0.ffn_up.weight", "IQ3_XXS") and not needs_importance(
        "output.weight", "IQ3_XXS"
    )
    assert needs_importance("output.weight", "IQ2_XXS")  # ggml ends the process without
    assert needs_importance("blk.0.ffn_up.weight", "Q2_K", "Q2_K_S") and "Q8_K" not in TENSOR_TYPES
