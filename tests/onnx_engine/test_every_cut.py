"""Cut graphs compute what one stock session computes, bit for bit, at every number of stages."""

import random

import onnxruntime as ort
import pytest
from onnx_references import NAMES, THREADS, assert_same, data_model, random_feeds, stock_outputs

from edgeinfer.onnx.cut import Graph
from edgeinfer.onnx.graph import read_onnx
from edgeinfer.onnx.optimize import optimize, take_in


class CutRunner:
    """Runs stages of a graph; the session of each stretch of nodes is made once."""

    def __init__(self, path, folder):
        self.optimized = folder / "optimized.onnx"
        self.path = path
        self.graph = Graph(optimize(read_onnx(path), self.optimized))
        self._sessions = {}

    def _session(self, stage):
        if stage not in self._sessions:
            model = self.graph.stage_model(stage)
            take_in(model, self.optimized)
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = THREADS
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent)
            )
            self._sessions[stage] = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[stage]

    def run_stage(self, stage, values):
        """{name: array} of what the stage gives."""
        names = list(stage.outputs)
        return dict(
            zip(names, self._session(stage).run(names, {name: values[name] for name in stage.inputs}))
        )

    def run(self, cuts, feeds):
        values = dict(feeds)
        for stage in self.graph.stages(sorted(cuts)):
            values.update(self.run_stage(stage, values))
        return {name: values[name] for name in self.graph.outputs}


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_stages(name, tmp_path):
    """From one stage to the most, a cut at a time; a new cut changes two stages, and only these are run
    again.
    """
    path = data_model(name)
    feeds = random_feeds(path)
    expected = stock_outputs(path, feeds)
    runner = CutRunner(path, tmp_path)
    places = runner.graph.places(None)
    random.Random(0).shuffle(places)
    assert len(places) >= len(runner.graph.nodes) // 2
    values = dict(feeds)
    run_before = set()
    for count in range(len(places) + 1):
        for stage in runner.graph.stages(sorted(places[:count])):
            if stage in run_before:
                continue
            made = runner.run_stage(stage, values)
            assert_same(made, {output: values.get(output, made[output]) for output in made})
            values.update(made)
            run_before.add(stage)
        assert_same({output: values[output] for output in expected}, expected)
    for count in (0, 1, len(places) // 2, len(places)):
        assert_same(runner.run(places[:count], feeds), expected)


def test_cuts_differ_from_node_to_node(tmp_path):
    """The most stages are one node each, and none is handed what it does not use."""
    path = data_model("gtcrn_simple")
    runner = CutRunner(path, tmp_path)
    stages = runner.graph.stages(runner.graph.places(None))
    assert len(stages) == len(runner.graph.nodes) > 400
    for stage in stages:
        node = runner.graph.nodes[stage.first]
        assert set(stage.inputs) <= set(node.input) and set(stage.outputs) <= set(node.output)
