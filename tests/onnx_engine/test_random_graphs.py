"""Random graphs in random stages, with random weights streamed: the outputs of one stock session, bit for
bit.
"""

import random

import numpy as np
import pytest
from onnx_references import THREADS, assert_same, stock_outputs
from random_graphs import WIDTH, write_random_model

pytest.importorskip("edgeinfer._native", reason="needs the C extension")

from edgeinfer.budget import Ledger
from edgeinfer.onnx.plan import OnnxPlan, ring_for, smallest_ring
from edgeinfer.onnx.prepare import prepare
from edgeinfer.onnx.prepared import Prepared
from edgeinfer.onnx.stages import Stages


def random_plan(stages, choice):
    """Any weights streamed, whatever their size, through one of the two rings."""
    streamed = {block.name for block in stages.blocks if choice.random() < 0.6}
    ring = choice.choice((ring_for, smallest_ring))(stages.blocks, streamed)
    resident = {block.name for block in stages.blocks} - streamed
    return OnnxPlan(
        "streaming",
        1 << 30,
        Ledger(),
        resident=frozenset(resident),
        streamed=frozenset(streamed),
        ring_bytes=ring,
    )


@pytest.mark.parametrize("seed", range(24))
def test_outputs_are_those_of_one_session(tmp_path, seed):
    choice = random.Random(seed)
    path = write_random_model(tmp_path / "model.onnx", seed)
    folder = tmp_path / "prepared"
    folder.mkdir()
    prepare(path, folder, 0, num_cuts=choice.choice((0, 1, 2, 5, 99)))
    prepared = Prepared.read(folder)
    names = [name for name, _, _ in prepared.outputs]
    stages = Stages(path, folder, prepared, THREADS, 1 << 28)
    try:
        for rows in (1, 7, 3):
            feeds = {"x": np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)}
            expected = stock_outputs(path, feeds)
            stages.arm(random_plan(stages, choice))
            for _ in range(2):
                assert_same(stages.run(feeds, names), expected)
    finally:
        stages.close()


def test_the_graphs_are_worth_it(tmp_path):
    """Over all seeds there are many stages, weights that are mapped, and every kind of node."""
    from edgeinfer.onnx.graph import read_onnx

    kinds, large, outside = set(), 0, 0
    for seed in range(24):
        file = read_onnx(write_random_model(tmp_path / f"{seed}.onnx", seed))
        kinds |= {name for _, name in file.operators}
        large += sum(tensor.nbytes > 100_000 for tensor in file.tensors)
        outside += len(file.paths) > 1
    assert kinds >= {"If", "Loop", "MatMul", "Add", "Split", "LayerNormalization", "Constant"}
    assert large > 100 and outside == 12
