"""Bits chosen for each tensor: the knapsack, what is measured for it, and that it beats the stock types."""

from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest
from stories import DATA, ROOT, needs_texts, training_corpus
from tiny import tiny_model

from edgeinfer.engines.ggml import BLOCKS
from edgeinfer.errors import ExportError
from edgeinfer.exporters.allocate import Option, allocate, smallest_bytes
from edgeinfer.exporters.auto_bits import measure, target_bytes
from edgeinfer.exporters.curve import AUTO, PLAIN, WEIGHTED, Point, draw_curve, measure_curve, round_steps
from edgeinfer.exporters.importance import gather_importance
from edgeinfer.exporters.perplexity import Perplexity, perplexity
from edgeinfer.exporters.quantize import quantize_gguf
from edgeinfer.exporters.rounding import dequantize, quantize, rows_of
from edgeinfer.exporters.sensitivity import group_tensors
from edgeinfer.exporters.windows import logits_of, scoring_engine, windows
from edgeinfer.modelfile import TensorInfo, read_model_file

PAGE = (ROOT / "exporters" / "texts" / "page.txt").read_text()
STORY = (ROOT / "models" / "story.md").read_text().split("## Samples")[1]
CONTEXT = 64


def options(rng):
    count = rng.integers(1, 6)
    return [Option(f"t{i}", int(rng.integers(1, 100)), float(rng.uniform(0, 1))) for i in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_that_fits_loses_less(seed):
    rng = np.random.default_rng(seed)
    items = {f"item{i}": options(rng) for i in range(5)}
    least = smallest_bytes(items)
    most = sum(max(option.num_bytes for option in kinds) for kinds in items.values())
    for room in np.linspace(least, most, 7).astype(int):
        found = allocate(items, room)
        assert sum(option.num_bytes for option in found.values()) <= room
        every = (combination for combination in product(*items.values()))
        fitting = (c for c in every if sum(option.num_bytes for option in c) <= room)
        best = min(sum(option.loss for option in c) for c in fitting)
        assert sum(option.loss for option in found.values()) == pytest.approx(best)
    assert allocate(items, least - 1) is None


def test_large_sizes_are_cut_into_steps_that_cost_little():
    rng = np.random.default_rng(1)
    items = {
        f"item{i}": [
            Option(str(bits), int(size * bits / 8), size * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)
        ]
        for i, size in enumerate(rng.integers(10**6, 10**9, 300))
    }
    room = int(smallest_bytes(items) * 2.1)
    used = sum(option.num_bytes for option in allocate(items, room).values())
    assert 0.999 * room < used <= room


def tensor(layer, role):
    return TensorInfo(f"blk.{layer}.{role}.weight", "F32", (256, 256), 0, 0, 0, layer, role, 0)


def test_tensors_are_measured_together_where_a_model_has_many():
    tensors = [tensor(layer, role) for role in ("attn_q", "ffn_up") for layer in range(40)]
    output = TensorInfo("output.weight", "F32", (256, 256), 0, 0, 0, None, "output", 0)
    assert [len(group) for group in group_tensors([output, *tensors], 200)] == [1] * 81
    groups = group_tensors([output, *tensors], 21)
    assert sum(map(len, groups)) == 81 and len(groups) == 21
    assert all(len({t.role for t in group}) == 1 for group in groups)
    assert [t.layer for t in groups[1]] == [0, 1, 2, 3]


def test_rounding_is_llama_cpps(tmp_path):
    """What a tensor is rounded to in memory is what the file holds afterwards."""
    model = tiny_model(tmp_path, "llama", "F32", layers=1)
    for type, name in (
        ("Q3_K", "blk.0.ffn_down.weight"),
        ("IQ4_XS", "blk.0.attn_q.weight"),
        ("F16", "output.weight"),
    ):
        mixture = {"Q3_K": "Q3_K_S", "F16": "Q8_0"}.get(type, type)
        quantize_gguf(model, tmp_path / "out.gguf", mixture, tensor_types={name: type})
        source, written = read_model_file(model), read_model_file(tmp_path / "out.gguf")
        values = rows_of(source, source.tensor(name))
        assert written.tensor(name).type == type
        rounded = dequantize(quantize(values, type), type, values.shape[1])
        assert np.array_equal(rounded, rows_of(written, written.tensor(name)))


@pytest.mark.parametrize("size, expected", [("2MiB", 2 << 20), ("50%", 500), ("12.5 %", 125), ("300", 300)])
def test_sizes_that_can_be_asked_for(size, expected):
    class File:
        file_bytes = 1000

    assert target_bytes(size, File) == expected
    for wrong in ("0%", "101%", "x%"):
        with pytest.raises(
            ExportError, match="is no share of the source. Expected one above 0% and at most 100%"
        ):
            target_bytes(wrong, File)


@pytest.fixture(scope="module", params=["story", "story-moe"])
def measured(request, tmp_path_factory):
    """(the float model, its importance matrix, what was measured, a folder)"""
    folder = tmp_path_factory.mktemp("auto")
    model = folder / "float.gguf"
    quantize_gguf(ROOT / "models" / f"{request.param}.gguf", model, "F32", requantize=True)
    importance = gather_importance(model, PAGE, context=CONTEXT, threads=1)
    smallest = int(4.1 * read_model_file(model).num_parameters / 8)  # below 4, slow types would be measured too
    chooser = measure(model, PAGE, importance, num_bytes=smallest, context=CONTEXT, threads=1)
    return model, importance, chooser, folder


def divergence(source, model, text):
    """Mean Kullback-Leibler divergence, in nats, of what `model` predicts from what `source` does."""
    predicted = []
    for path in (source, model):
        with scoring_engine(path, context=CONTEXT, threads=1) as engine:
            logits = []
            for window in windows(engine.model, text, CONTEXT, "a test"):
                logits_of(engine, window, 8, lambda _position, row: logits.append(row.astype(np.float64)))
        rows = np.array(logits)
        rows -= rows.max(1, keepdims=True)
        predicted.append(rows - np.log(np.exp(rows).sum(1, keepdims=True)))
    before, after = predicted
    return (np.exp(before) * (before - after)).sum(1).mean()


def test_auto_beats_q4_k_m_at_its_size(measured):
    """On another text than that of the choice, and against Q4_K_M with the same importance matrix."""
    model, importance, chooser, folder = measured
    stock = quantize_gguf(model, folder / "stock.gguf", "Q4_K_M", importance=importance)
    choice = chooser.choose(stock.target_bytes)
    auto = quantize_gguf(
        model, folder / "auto.gguf", choice.mixture, importance=importance, tensor_types=choice.types
    )
    assert auto.target_bytes <= choice.num_bytes <= stock.target_bytes
    assert auto.target_bytes > 0.97 * stock.target_bytes
    found = divergence(model, folder / "auto.gguf", STORY)
    assert found < 0.8 * divergence(model, folder / "stock.gguf", STORY)
    # computing with quantized weights rounds activations too, which is not the choice's
    assert choice.divergence / 5 < found < choice.divergence * 5


def test_files_keep_the_size_that_was_asked_for(measured):
    model, importance, chooser, folder = measured
    before = np.inf
    for num_bytes in (4_600_000, 6_000_000, 40_000_000):
        choice = chooser.choose(num_bytes)
        report = quantize_gguf(
            model, folder / "out.gguf", choice.mixture, importance=importance, tensor_types=choice.types
        )
        assert report.target_bytes <= num_bytes and choice.divergence < before
        assert {name: report.tensors[name] for name in choice.types} == choice.types
        before = choice.divergence
    assert choice.divergence == 0
    with pytest.raises(
        ExportError, match=r"cannot be made as small as 97.7 KiB: the smallest that can be is .* MiB"
    ):
        chooser.choose(100_000)


def test_types_that_compute_slowly_are_for_small_files_only(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeinfer.exporters.auto_bits.CANDIDATES", ("IQ3_S", "Q2_K", "Q4_K", "Q6_K", "Q8_0"))
    model = tiny_model(tmp_path, "llama", "F16", layers=1, ffn=256, tied=True)
    importance = gather_importance(model, PAGE, context=CONTEXT, threads=1)

    def slow(bits, measured_for):
        num_bytes = [int(bits * read_model_file(model).num_parameters / 8) for bits in (bits, measured_for)]
        chooser = measure(model, PAGE, importance, num_bytes=num_bytes[1], context=CONTEXT, threads=1)
        types = chooser.choose(num_bytes[0]).types
        quantize_gguf(model, tmp_path / "out.gguf", "Q4_K_M", importance=importance, tensor_types=types)
        return sum(type.startswith(("IQ2", "IQ3")) for type in types.values())

    assert slow(3.5, 3.5) > 0 and slow(4.5, 3.5) == slow(4.5, 4.5) == 0


def test_a_size_that_no_file_can_have_is_known_before_measuring(tmp_path):
    model = tiny_model(tmp_path, "llama", "F32", layers=1)
    importance = gather_importance(model, PAGE, context=CONTEXT, threads=1)

    def no_progress(_fraction):
        raise AssertionError("measured")

    with pytest.raises(ExportError, match="the smallest that can be is"):
        measure(model, PAGE, importance, num_bytes=1000, threads=1, progress=no_progress)


def test_rows_that_no_quantized_type_divides(tmp_path):
    """They become a smaller float type."""
    model = tiny_model(tmp_path, "llama", "F32", layers=1, ffn=250)
    importance = gather_importance(model, PAGE, context=CONTEXT, threads=1)
    chooser = measure(model, PAGE, importance, num_bytes=600_000, context=CONTEXT, threads=1)
    choice = chooser.choose(600_000)
    assert choice.types["blk.0.ffn_down.weight"] in ("F16", "BF16")
    assert BLOCKS[choice.types["blk.0.ffn_up.weight"]].block_size > 1
    quantize_gguf(
        model, tmp_path / "out.gguf", choice.mixture, importance=importance, tensor_types=choice.types
    )


@needs_texts
def test_auto_predicts_held_out_stories_no_worse_than_q4_k_m(measured, tmp_path):
    model, importance, chooser, _folder = measured
    text = "\n\n".join(training_corpus().held_out[::4])
    stock = quantize_gguf(model, tmp_path / "stock.gguf", "Q4_K_M", importance=importance)
    choice = chooser.choose(stock.target_bytes)
    quantize_gguf(
        model, tmp_path / "auto.gguf", choice.mixture, importance=importance, tensor_types=choice.types
    )
    scores = [perplexity(tmp_path / name, text, threads=1).value for name in ("auto.gguf", "stock.gguf")]
    assert scores[0] <= scores[1] and DATA


def test_the_curve_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeinfer.exporters.curve.STOCK", ("Q3_K_M", "Q4_K_M"))
    monkeypatch.setattr("edgeinfer.exporters.curve.AUTO_AT", ("Q4_K_M",))
    model = tiny_model(tmp_path, "llama", "F32", layers=1)
    importance = gather_importance(model, PAGE, context=CONTEXT, threads=1)
    chooser = measure(model, PAGE, importance, num_bytes=10**6, context=CONTEXT, threads=1)
    before = sorted(tmp_path.iterdir())
    points = measure_curve(model, PAGE * 2, importance, chooser.choose, tmp_path, threads=1)
    assert sorted(tmp_path.iterdir()) == before
    assert [(p.series, p.label) for p in points[:4]] == [
        (series, type) for series in (PLAIN, WEIGHTED) for type in ("Q3_K_M", "Q4_K_M")
    ]
    assert points[4].series == AUTO and points[4].num_bytes <= points[3].num_bytes
    svg = draw_curve("a <model>", 10**7, Perplexity.of(np.full(9, 2.0)), points)
    words = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert {"a <model>", "auto", "with importance matrix"} <= set(words)
    assert any(word.startswith("Q4_K_M") for word in words)


def test_points_far_off_are_drawn_at_the_edge():
    def point(value, size):
        return Point(PLAIN, f"T{size}", size, Perplexity.of(np.full(9, np.log(value))))

    svg = draw_curve("m", 4000, Perplexity.of(np.full(9, np.log(10))), [point(500, 1000), point(11, 2000)])
    assert "T1000 (500)" in svg and "T2000<" in svg
    assert all(float(e.get("y", 90)) >= 0 for e in ElementTree.fromstring(svg).iter())


def test_axes_have_round_numbers():
    assert round_steps(2.85, 6.75) == [3, 4, 5, 6]
    assert round_steps(11.68, 13.2) == pytest.approx([12, 12.5, 13])
    assert round_steps(5, 5) == [5]
