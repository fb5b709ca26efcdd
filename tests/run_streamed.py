"""A process for tests that inject faults: computes batches through the streaming engine, tells what happened.

python run_streamed.py MODEL OUT.npy '{"kind": ..., "batches": [[...], ...], ...}'

Writes the logits that it got to OUT.npy, and one JSON line: {"error": message or null, "statistics": {...}}.
"""

import json
import sys

import numpy as np
from streaming import streaming_engine

from edgeinfer.errors import EdgeInferError


def main(path: str, out: str, options: str) -> None:
    settings = json.loads(options)
    batches = settings.pop("batches")
    logits, error = [], None
    with streaming_engine(path, **settings) as engine:
        try:
            for batch in batches:
                engine.prefill(batch)
                logits += [engine.context.logits(i).copy() for i in range(len(batch))]
        except EdgeInferError as raised:
            error = f"{type(raised).__name__}: {raised}"
        statistics = engine._paged.statistics()
    np.save(out, np.stack(logits) if logits else np.empty((0, 0), np.float32))
    print(json.dumps({"error": error, "statistics": statistics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
