"""What daemons count."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.web.counting import History, Sizes, Timings
from termite.web.logtail import LogRing, LogTail, end_of_file
from termite.web.status import Phase


def test_a_phase_has_its_count_sum_and_longest() -> None:
    timings = Timings()
    timings.add("run", 1.0)
    timings.add("run", 3.0)
    with pytest.raises(ZeroDivisionError), timings.measure("fail"):
        raise ZeroDivisionError
    run, fail = timings.phases()
    assert run == Phase("run", 2, 4.0, 3.0) and run.mean_s == 2.0
    assert (fail.phase, fail.count) == ("fail", 1)
    other = Timings()
    other.merge(timings.phases())
    other.merge(timings.phases())
    assert other.phases()[0] == Phase("run", 4, 8.0, 3.0)


@given(st.lists(st.integers(0, 1 << 50), max_size=50))
def test_every_file_is_in_the_bucket_for_its_size(all_sizes: list[int]) -> None:
    sizes = Sizes()
    for size in all_sizes:
        sizes.add(size)
    histogram = sizes.histogram()
    assert (histogram.files, histogram.bytes) == (len(all_sizes), sum(all_sizes))
    below = -1
    for bucket in histogram.buckets:
        inside = [size for size in all_sizes if below < size <= bucket.up_to]
        assert (bucket.files, bucket.bytes) == (len(inside), sum(inside))
        below = bucket.up_to
    assert sum(bucket.files for bucket in histogram.buckets) == len(all_sizes)


def test_a_history_keeps_the_latest_and_turns_totals_into_rates() -> None:
    history = History(kept=3)
    for second, total in enumerate((100, 150, 150, 400)):
        history.add("level", second)
        history.add_total("rate", total, float(second))
    level, rate = history.plot("t", "/s", ["level", "rate"]).lines
    assert level.values == [1, 2, 3]
    assert rate.values == [50, 0, 250]
    assert history.latest("rate") == 250 and history.latest("never") == 0


def test_a_ring_holds_no_more_than_its_limit() -> None:
    ring = LogRing(limit=100)
    for number in range(50):
        ring.emit(logging.LogRecord("x", logging.INFO, "", 0, "line %d", (number,), None))
    ring.emit(logging.LogRecord("x", logging.INFO, "", 0, "%s", ("y" * 1000,), None))
    assert len(ring.text()) <= 101


def test_the_end_of_a_file_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\nsecond \xff\nthird\n")
    assert end_of_file(str(path)) == "first\nsecond \\xff\nthird\n"
    assert end_of_file(str(path), 10) == "third\n"
    assert "No such file" in end_of_file(str(tmp_path / "missing"))


def test_without_a_file_the_latest_lines_are_remembered() -> None:
    tail = LogTail()
    tail.start()
    try:
        logging.getLogger("termite.test").warning("remember %s", "this")
        assert "remember this" in tail.status("w").text
    finally:
        tail.stop()
    logging.getLogger("termite.test").warning("not this")
    assert "not this" not in tail.status("w").text
