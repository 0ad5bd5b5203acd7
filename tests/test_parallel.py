from __future__ import annotations

import threading

import pytest

from wsi_pipeline.errors import Interrupted
from wsi_pipeline.instances.parallel import ordered_map


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    assert list(ordered_map(lambda x: x * x, range(50), workers=workers, stop=lambda: False)) == [
        x * x for x in range(50)
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_errors_come_out(workers):
    def fail(x):
        if x == 7:
            raise KeyError(x)
        return x

    with pytest.raises(KeyError):
        list(ordered_map(fail, range(50), workers=workers, stop=lambda: False))


@pytest.mark.parametrize("workers", [1, 3])
def test_stop_is_heard_and_little_more_is_started(workers):
    started = []
    stop = threading.Event()
    results = ordered_map(started.append, range(1000), workers=workers, stop=stop.is_set)
    next(results)
    stop.set()
    with pytest.raises(Interrupted):
        list(results)
    assert len(started) <= 1 + 3 * workers


def test_work_is_taken_as_it_is_needed():
    taken = []

    def items():
        for x in range(1000):
            taken.append(x)
            yield x

    results = ordered_map(lambda x: x, items(), workers=2, stop=lambda: False)
    next(results)
    assert len(taken) < 20
    results.close()


def test_no_workers():
    with pytest.raises(ValueError, match="workers"):
        list(ordered_map(str, [1], workers=0, stop=lambda: False))
