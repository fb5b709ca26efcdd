"""Tiny random models of every architecture, made once a session.

@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")

def test_something(models):
    path = tiny_model(models, "qwen3", "Q4_K")
"""

import hashlib
import json
import sys
from pathlib import Path

# `pytest` does not add the root of the project, where benchmarks/ is
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.architecture import read_architecture  # noqa: E402
from benchmarks.maker import make_model  # noqa: E402

# 256 is a block of the K-quants
SHAPE = {"embedding": 256, "ffn": 512, "heads": 4, "vocabulary": 512, "context": 2048}
# only for the architectures that have such a dimension
SPECIAL_SHAPE = {"experts": 8, "experts_used": 2, "sliding_window": 128}


def tiny_model(
    directory: Path, arch: str, type: str, *, layers: int = 3, seed: int = 0, alignment: int = 32, **overrides
) -> Path:
    """The path of a model of 1 to 10 MB in `directory`; made by the first call with these arguments.

    `arch` names a file of benchmarks/architectures/. `overrides` are dimensions, or `tied` or `routing`, as
    benchmarks.maker.plan_model takes them. Do not write to the file: other tests use it.
    """
    defaults = read_architecture(arch).defaults
    options = {"layers": layers, "seed": seed, "alignment": alignment, **SHAPE}
    options |= {name: value for name, value in SPECIAL_SHAPE.items() if name in defaults}
    if "kv_heads" not in defaults:
        options["kv_heads"] = 2
    options |= overrides
    if "chunk_experts" in defaults:
        options.setdefault("chunk_experts", options["experts"] // 2)
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(directory) / f"{arch}-{type}-{key}.gguf"
    return path if path.exists() else make_model(path, arch, type, **options)
