"""A pipeline from its source to its sinks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from edgeinfer.streams.feeder import Feeder
from edgeinfer.streams.pipeline import Pipeline, StageStep
from edgeinfer.streams.report import StreamReport, percentiles

MOST_LATENCIES = 1_000_000  # a stream without an end must not fill memory

Consume = Callable[[list[StageStep]], None]


def run_pipeline(
    pipeline: Pipeline,
    source: Iterable[Any],
    consume: Consume,
    *,
    late: str = "wait",
    depth: int = 8,
    live: bool = False,
    seconds_of: Callable[[Any], float] | None = None,
) -> StreamReport:
    """Feed `source` to `pipeline`, give the steps to `consume`, and say how it went.

    `late`, `depth`, `seconds_of`: see edgeinfer.streams.feeder.Feeder. `live`: latency counts from when a
    piece came, not from when computing began. Ctrl-C ends the stream as its end does, and is raised again
    when everything is done, with the report as its argument.
    """
    latencies: list[float] = []
    taken = 0
    interrupted: KeyboardInterrupt | None = None
    with Feeder(source, late=late, depth=depth, seconds_of=seconds_of) as feeder:
        try:
            # Who waits for every piece is woken for each. Only what may be dropped has to stay in the queue.
            for piece in chain.from_iterable(feeder.batches()) if late == "wait" else feeder:
                began = piece.arrival if live else time.perf_counter()
                if piece.missed:
                    consume(pipeline.skip(piece.missed))
                steps = pipeline.feed(piece.data)
                if len(latencies) < MOST_LATENCIES:
                    latencies.append(time.perf_counter() - began)
                taken += _length(piece.data, pipeline)
                consume(steps)
        except KeyboardInterrupt as error:
            interrupted = error
        if feeder.missed_at_end:
            consume(pipeline.skip(feeder.missed_at_end))
        consume(pipeline.finish())
        report = _report(pipeline, feeder, taken, latencies)
    if interrupted is not None:
        raise KeyboardInterrupt(report) from None
    return report


def _length(data: Any, pipeline: Pipeline) -> int:
    return len(data) if pipeline.on_sound else 1


def _report(pipeline: Pipeline, feeder: Feeder, taken: int, latencies: list[float]) -> StreamReport:
    busy = sum(stream.busy_seconds for stream in pipeline.streams.values())
    seconds = taken / pipeline.rate if pipeline.on_sound else None
    return StreamReport(
        seconds=seconds,
        pieces=feeder.taken,
        dropped=feeder.dropped,
        dropped_seconds=feeder.dropped_samples / pipeline.rate if pipeline.on_sound else None,
        computing_seconds=busy,
        real_time_factor=busy / seconds if seconds else None,
        latency=percentiles(latencies),
        steps={name: stream.steps for name, stream in pipeline.streams.items()},
        open_share=pipeline.open_share(taken),
    )
