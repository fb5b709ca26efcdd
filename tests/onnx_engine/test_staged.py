"""Models that are larger than their budget: the outputs of a stock session, and what the plan says of it."""

import gc
import re
import threading

import numpy as np
import onnx
import pytest
from made_encoders import FLOAT, FOUR_BITS, MIB, TABLE, Encoder, encoder_file, tokens
from onnx import TensorProto, helper, numpy_helper
from onnx_references import THREADS, assert_same, stock_outputs

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.budget import process_memory
from edgeinfer.engines.onnx import open_onnx
from edgeinfer.errors import BudgetError, InputError, ReadError
from edgeinfer.onnx.homes import give_back_memory

LITTLE = 50 * MIB  # about what one stage needs, with its session and its inputs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared once for all tests of this file. The first run of any model brings in code, so one runs
    before.
    """
    warm = encoder_file(tmp_path_factory.mktemp("warm"), Encoder(layers=1, width=128, ffn=256))
    stock_outputs(warm, tokens(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=[FLOAT, FOUR_BITS], ids=["float32", "4 bits"])
def model(request, cache, tmp_path_factory):
    return encoder_file(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def float_model(cache, tmp_path_factory):
    return encoder_file(tmp_path_factory.mktemp("float"), FLOAT)


def opened(path, room, **options):
    """The model with a budget of `room` bytes more than this process holds now."""
    gc.collect()
    give_back_memory()
    return open_onnx(path, memory=process_memory().rss_bytes + room, threads=THREADS, **options)


@pytest.mark.parametrize("room", [LITTLE, 60 * MIB, 75 * MIB])
def test_outputs_are_the_stock_sessions(model, room):
    expected = {batch: stock_outputs(model, tokens(batch)) for batch in (1, 3)}
    with opened(model, room) as staged:
        assert staged.mode == "streaming" and staged.plan.num_stages > 1
        assert [port.describe() for port in staged.inputs] == ["int64 [batch, sequence]"]
        for batch in (1, 3, 3, 1):
            assert_same(staged.run(tokens(batch)), expected[batch])
        assert staged.statistics().passes == 4


def test_more_room_streams_less(float_model):
    streamed = []
    for room in (LITTLE, 56 * MIB, 62 * MIB):
        with opened(float_model, room) as staged:
            staged.run(tokens(1))
            plan = staged.plan
            assert plan.ledger.total <= plan.budget_bytes
            before = staged.statistics().streamed_bytes
            staged.run(tokens(1))
            staged.run(tokens(1))
            read = staged.statistics().streamed_bytes - before
            # reading ahead begins with the plan, and goes on over the end of a pass into the next
            slack = plan.ring_bytes + MIB
            assert abs(read - 2 * plan.streamed_bytes) <= slack
            streamed.append(plan.streamed_bytes)
    assert streamed[0] > streamed[1] > streamed[2]


def test_everything_stays_where_it_fits(float_model):
    with opened(float_model, 110 * MIB) as staged:
        staged.run(tokens(1))
        assert staged.plan.streamed_bytes == staged.plan.ring_bytes == 0
        staged.run(tokens(1))
        before = staged.statistics()
        assert_same(staged.run(tokens(1)), stock_outputs(float_model, tokens(1)))
        assert staged.statistics().streamed_bytes == before.streamed_bytes


def test_one_stock_session_where_all_fits(float_model):
    with opened(float_model, 300 * MIB) as model:
        assert model.mode == "in-memory" and model.plan.num_stages == 1
        assert "fits" in model.plan.reason
        assert_same(model.run(tokens(2)), stock_outputs(float_model, tokens(2)))


def smallest_budget(path):
    """What the refusal of a smaller one names. It counts what this process holds, so it changes from test
    to test.
    """
    with pytest.raises(BudgetError, match="the smallest that works is") as refusal:
        opened(path, 1 * MIB)
    assert f"({refusal.value.smallest_bytes} bytes)" in str(refusal.value)
    return refusal.value.smallest_bytes


def test_the_smallest_budget_works_and_less_is_refused(model):
    opened(model, LITTLE).close()  # prepared: before that, nothing smaller is tried
    with open_onnx(model, memory=smallest_budget(model) + 2 * MIB, threads=THREADS) as staged:
        assert_same(staged.run(tokens(1)), stock_outputs(model, tokens(1)))
    with pytest.raises(BudgetError):
        open_onnx(model, memory=smallest_budget(model) - 4 * MIB, threads=THREADS)


def test_an_input_beyond_the_budget_is_refused_and_smaller_ones_still_run(float_model):
    with opened(float_model, LITTLE) as staged:
        with pytest.raises(
            BudgetError, match=r"too small for this input \(tokens \[96, 64\]\).*Raise --memory"
        ):
            staged.run(tokens(96, 64))
        assert_same(staged.run(tokens(1)), stock_outputs(float_model, tokens(1)))


def test_lengths_that_grow_take_no_more_than_the_longest_alone(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = encoder_file(tmp_path, FLOAT)
    taken = []
    for lengths in ((320,), range(8, 328, 8)):
        with opened(path, 80 * MIB) as staged:
            for length in lengths:
                found = staged.run(tokens(1, length))
            taken.append(staged.plan.ledger.entries["activations"])
        assert_same(found, stock_outputs(path, tokens(1, 320)))
        (tmp_path / "cache" / "edgeinfer" / "measured.json").unlink()
    assert taken[1] < taken[0] + 16 * MIB  # the results of all lengths are 26 MiB, twice


def test_what_a_refused_input_leaves_is_counted(float_model):
    expected = stock_outputs(float_model, tokens(1))
    with opened(float_model, 80 * MIB) as staged:
        staged.run(tokens(1))
        before = staged.plan.ledger.entries["resident_weights"]
        for length in (800, 900, 1200):
            with pytest.raises(BudgetError, match="too small for this input"):
                staged.run(tokens(1, length))
        for _ in range(2):
            assert_same(staged.run(tokens(1)), expected)
        assert staged.plan.ledger.entries["resident_weights"] < before
        assert process_memory().rss_bytes <= staged.plan.budget_bytes


def widened_file(folder):
    """Products of `rows` equal rows: how much is computed is in a value, not in the size of an input."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Concat", ["rows", "width"], ["sizes"], axis=0),
        helper.make_node("Expand", ["x", "sizes"], ["h0"]),
    ]
    weights = [numpy_helper.from_array(np.array([1024]), "width")]
    for layer in range(12):
        weight = rng.standard_normal((1024, 1024), np.float32) / 32
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("ReduceMax", ["h12"], ["y"], axes=[0], keepdims=1))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1024]) for name in "xy")
    rows = helper.make_tensor_value_info("rows", TensorProto.INT64, [1])
    graph = helper.make_graph(nodes, "g", [x, rows], [y], weights)
    path = folder / "widened.onnx"
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def test_values_that_make_a_pass_larger_keep_the_budget(cache, tmp_path):
    path = widened_file(tmp_path)
    x = np.random.default_rng(1).standard_normal((1, 1024), np.float32)
    with opened(path, 85 * MIB) as staged:
        for rows in (1, 1, 2500, 2500, 3500, 1):
            feeds = {"x": x, "rows": np.array([rows])}
            assert_same(staged.run(feeds), stock_outputs(path, feeds))
            gc.collect()
            give_back_memory()
            assert process_memory().rss_bytes <= staged.plan.budget_bytes, rows
        with pytest.raises(BudgetError, match="too small for this input"):
            staged.run({"x": x, "rows": np.array([20_000])})
        staged.run({"x": x, "rows": np.array([1])})
        staged.run({"x": x, "rows": np.array([1])})
        assert process_memory().rss_bytes <= staged.plan.budget_bytes


def test_closing_gives_back_what_inputs_took(float_model):
    with opened(float_model, 80 * MIB) as staged:
        before = process_memory().rss_bytes
        staged.run(tokens(16, 32))
        assert staged.plan.ledger.entries["activations"] > 20 * MIB
    gc.collect()
    give_back_memory()
    assert process_memory().rss_bytes < before + 4 * MIB


def test_counters_may_be_looked_at_while_plans_change(float_model):
    stopped, problems = threading.Event(), []

    def look():
        while not stopped.is_set():
            try:
                staged.statistics()
            except Exception as error:
                problems.append(error)

    with opened(float_model, 80 * MIB) as staged:
        watchers = [threading.Thread(target=look) for _ in range(2)]
        for watcher in watchers:
            watcher.start()
        try:
            for length in range(8, 40, 4):
                staged.run(tokens(1, length))
        finally:
            stopped.set()
            for watcher in watchers:
                watcher.join()
    assert problems == []


def test_what_inputs_take_is_kept(float_model):
    with opened(float_model, 60 * MIB) as staged:
        staged.run(tokens(5))
        first = staged.plan
    with opened(float_model, 60 * MIB) as staged:
        assert_same(staged.run(tokens(5)), stock_outputs(float_model, tokens(5)))
        assert staged.plan.ledger.entries["activations"] == first.ledger.entries["activations"]
        # one pass, of the plan that the first one has led to
        resident = staged.plan.ledger.entries["resident_weights"]
        assert staged.statistics().streamed_bytes <= staged.plan.streamed_bytes + staged.plan.ring_bytes + MIB
        assert resident > 0


def test_scales_of_4_bit_weights_are_not_read(cache, tmp_path):
    """They are inside the rearranged weights: neither kept nor streamed."""
    path = encoder_file(tmp_path, FOUR_BITS)
    scales = sum(weight.nbytes for weight in FOUR_BITS.weights() if weight.name.endswith("scales"))
    others = sum(weight.nbytes for weight in FOUR_BITS.weights()) - scales
    with opened(path, LITTLE) as staged:
        staged.run(tokens(1))
        entries = staged.plan.ledger.entries
        # rearranged: with their scales and as many sums of blocks
        assert staged.plan.streamed_bytes + entries["resident_weights"] < others + 2.2 * scales


def test_rows_of_a_large_table_are_read(cache, tmp_path):
    path = encoder_file(tmp_path, TABLE)
    with opened(path, LITTLE) as staged:
        for feeds in (tokens(2, vocabulary=20_000), tokens(1, vocabulary=20_000)):
            assert_same(staged.run(feeds), stock_outputs(path, feeds))
        assert len(staged.plan.rows) == 1
        assert (
            staged.statistics().streamed_bytes < 30 * MIB
        )  # two passes, the first of all 12 MiB of matrices
        negative = {"tokens": np.array([[-1, -20_000, 19_999, 0]])}
        assert_same(staged.run(negative), stock_outputs(path, negative))
        with pytest.raises(Exception, match="out of data bounds|out of range"):
            staged.run({"tokens": np.array([[20_000]])})
        assert_same(staged.run(negative), stock_outputs(path, negative))


def test_two_models_at_once(float_model):
    with opened(float_model, 60 * MIB) as one, opened(float_model, 60 * MIB) as other:
        expected = stock_outputs(float_model, tokens(2))
        for staged in (one, other, one, other):
            assert_same(staged.run(tokens(2)), expected)
        one.close()
        assert_same(other.run(tokens(2)), expected)


def test_not_a_number_passes_through(cache, tmp_path):
    import onnx

    path = encoder_file(tmp_path, FLOAT)
    model = onnx.load(path, load_external_data=False)
    embedding = model.graph.node[0].output[0]  # fed instead of looked up
    del model.graph.node[0], model.graph.input[0]
    model.graph.input.append(onnx.helper.make_tensor_value_info(embedding, 1, ["batch", "sequence", 512]))
    onnx.save_model(model, path)
    values = np.random.default_rng(0).standard_normal((1, 4, 512)).astype(np.float32)
    values[0, 2, 5] = np.nan
    with opened(path, LITTLE) as staged:
        found = staged.run({embedding: values})
    assert_same(found, stock_outputs(path, {embedding: values}))
    assert np.isnan(found["hidden"][0]).any()


def test_wrong_inputs_are_named(float_model):
    with opened(float_model, LITTLE) as staged:
        with pytest.raises(
            InputError, match=r"no input 'ids'. Its inputs are tokens \(int64 \[batch, sequence\]\)"
        ):
            staged.run({"ids": np.zeros((1, 1), np.int64)})
        with pytest.raises(InputError, match="'tokens': expected type int64, got int32"):
            staged.run({"tokens": np.zeros((1, 1), np.int32)})
        with pytest.raises(InputError, match=r"'tokens': expected shape \[batch, sequence\], got \[3\]"):
            staged.run({"tokens": np.zeros(3, np.int64)})
        with pytest.raises(InputError, match="no output 'logits'. Its outputs are hidden"):
            staged.run(tokens(1), ["logits"])
        assert staged.run(tokens(1), []) == {}


def test_a_prepared_file_that_changes_ends_the_run(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = encoder_file(tmp_path, FLOAT)
    with opened(path, 58 * MIB) as staged:
        staged.run(tokens(1))
        data = sorted((tmp_path / "cache").rglob("stage-*.data"))
        with open(data[3], "r+b") as file:
            file.truncate(100)
        with pytest.raises(ReadError, match="prepared files .* could not be used any more"):
            staged.run(tokens(1))
    with opened(path, 58 * MIB) as staged:  # it was noticed, and is prepared again
        assert_same(staged.run(tokens(1)), stock_outputs(path, tokens(1)))


def test_preparing_says_what_it_takes_and_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = encoder_file(tmp_path, FLOAT)
    said, done = [], []
    for _ in range(2):
        with opened(path, 58 * MIB, say=said.append, progress=done.append):
            assert done == sorted(done) and done[-1] == 1 and len(done) > 4
        done.clear()
    assert len(said) == 1
    match = re.search(r"Preparing encoder.onnx .* about (\d+) MiB in (\S+)\.", said[0])
    folder = tmp_path / "cache" / "edgeinfer" / "onnx"
    assert match[2] == str(folder)
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert 0.8 * taken < int(match[1]) * MIB < 1.3 * taken
