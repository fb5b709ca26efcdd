"""The bounded queue between sensing and computing."""

import threading
import time

import numpy as np
import pytest

from edgeinfer.streams.feeder import Feeder


def numbered(count, length=3):
    return [np.full(length, number, np.float32) for number in range(count)]


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_nothing_is_lost_while_the_source_waits(depth):
    with Feeder(numbered(40), late="wait", depth=depth) as feeder:
        pieces = list(feeder)
    assert [piece.data[0] for piece in pieces] == list(range(40))
    assert feeder.dropped == 0 and feeder.taken == 40 and not any(piece.missed for piece in pieces)


@pytest.mark.parametrize(
    ("late", "kept", "missed", "at_end"),
    [("drop-oldest", [7, 8, 9], [21, 0, 0], 0), ("drop-newest", [0, 1, 2], [0, 0, 0], 21)],
)
def test_late_pieces_are_dropped_by_rule_and_counted(late, kept, missed, at_end):
    with Feeder(numbered(10), late=late, depth=3) as feeder:
        wait_until(lambda: feeder.taken == 10)  # nobody computes
        pieces = list(feeder)
    assert [piece.data[0] for piece in pieces] == kept
    assert [piece.missed for piece in pieces] == missed
    assert (feeder.dropped, feeder.dropped_samples, feeder.missed_at_end) == (7, 21, at_end)


def test_what_was_dropped_is_known_where_it_was():
    go = threading.Event()

    def source():
        yield from numbered(6)
        go.wait(30)
        yield from numbered(1)

    with Feeder(source(), late="drop-newest", depth=2) as feeder:
        wait_until(lambda: feeder.taken == 6)
        pieces = iter(feeder)
        first = [next(pieces), next(pieces)]
        go.set()
        last = next(pieces)
    assert [piece.missed for piece in first] == [0, 0] and last.missed == 4 * 3


@pytest.mark.parametrize("late", ["drop-oldest", "drop-newest"])
def test_what_comes_faster_than_real_time_waits(late):
    """A file in a pipe, or what a microphone gave before the model was loaded."""
    with Feeder(numbered(40), late=late, depth=3, seconds_of=lambda piece: 1000.0) as feeder:
        time.sleep(0.05)
        pieces = list(feeder)
    assert [piece.data[0] for piece in pieces] == list(range(40)) and feeder.dropped == 0


def test_a_live_source_does_not_wait():
    def live():
        for piece in numbered(10):
            time.sleep(0.01)
            yield piece

    with Feeder(live(), late="drop-oldest", depth=3, seconds_of=lambda piece: 0.01) as feeder:
        wait_until(lambda: feeder.taken == 10)  # nobody computes
        kept = [piece.data[0] for piece in feeder]
    assert kept == [7, 8, 9] and feeder.dropped == 7


def test_an_error_of_the_source_comes_behind_its_pieces():
    def source():
        yield from numbered(2)
        raise ValueError("broken microphone")

    seen = []
    with pytest.raises(ValueError, match="broken microphone"), Feeder(source()) as feeder:
        for piece in feeder:
            seen.append(piece)
    assert len(seen) == 2


def test_leaving_early_ends_a_source_that_waits():
    with Feeder(iter(numbered(1000)), depth=1) as feeder:
        next(iter(feeder))
    wait_until(lambda: not feeder._thread.is_alive())


def test_sensing_goes_on_while_computing():
    times = []

    def source():
        for piece in numbered(4):
            time.sleep(0.05)
            times.append(time.monotonic())
            yield piece

    with Feeder(source(), depth=8) as feeder:
        for count, _piece in enumerate(feeder):
            if count == 0:
                wait_until(lambda: len(times) == 4)  # the source goes on during the first step


@pytest.mark.parametrize("options", [{"late": "never"}, {"depth": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Feeder([], **options)
