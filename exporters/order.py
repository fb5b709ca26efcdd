"""The order in which a model's weights are used: from llama.cpp's graph, or else guessed from their names.

The graph is made in a child process (`python -m edgeinfer.exporters.order MODEL`), because llama.cpp ends the
process where a model does not suit it, and a file can be laid out without being able to run.
"""

from __future__ import annotations

import json
import subprocess
import sys

from edgeinfer.modelfile import ModelFile, read_model_file
from edgeinfer.system import streaming_support

_CONTEXT = 256  # llama.cpp makes no smaller one; its KV cache is memory that is touched
_UBATCH = 8
_TIMEOUT_SECONDS = 300


def order_of_use(file: ModelFile, memory: int) -> tuple[list[str], bool]:
    """(names of all tensors, whether llama.cpp's graph was seen). `memory`: bytes that looking at it may
    take.

    What a pass does not use (other heads, for example) comes last. No weights are read.
    """
    names = _graph_order(file) if streaming_support() and _needed_bytes(file) <= memory else None
    seen = dict.fromkeys(name for name in names or ())
    rest = [tensor.name for tensor in file.tensors if tensor.name not in seen]
    return ([*seen, *rest], True) if seen else (by_name(file), False)


def by_name(file: ModelFile) -> list[str]:
    """The token embedding, what belongs to no layer but the output, the layers, the output; else as in the
    file.
    """

    def place(name: str, layer: int | None) -> tuple[int, int]:
        if layer is not None:
            return 2, layer
        return (0 if name.startswith("token_embd") else 3 if name.startswith("output") else 1), 0

    return [
        tensor.name for tensor in sorted(file.tensors, key=lambda tensor: place(tensor.name, tensor.layer))
    ]


def _needed_bytes(file: ModelFile) -> int:
    """About what the child holds: Python, libraries and vocabulary (measured: 64 MB with a small one), and a
    KV cache.
    """
    from edgeinfer.engines.overhead import kv_bytes_per_token

    return (80 << 20) + 256 * (file.vocab_size or 0) + _CONTEXT * kv_bytes_per_token(file)


def _graph_order(file: ModelFile) -> list[str] | None:
    command = [sys.executable, "-m", "edgeinfer.exporters.order", str(file.paths[0])]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
        )
        known = {tensor.name for tensor in file.tensors}
        names = json.loads(child.stdout) if child.returncode == 0 else []
        return [name for name in names if name in known]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def main(path: str) -> None:
    """The child: print the names in their order of use, once each, as JSON."""
    from edgeinfer.engines.opening import Prepared

    prepared = Prepared(read_model_file(path), context_length=_CONTEXT, threads=1, ubatch=_UBATCH)
    try:
        print(json.dumps(list(dict.fromkeys(use.name for use in prepared.uses))))
    finally:
        prepared.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
