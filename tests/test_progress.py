"""Progress: a bar on a terminal, lines a minute apart in a log, those of libraries too."""

import logging
import sys

import pytest
from tqdm import tqdm

from compression import progress as module
from compression.progress import bars_of_libraries, progress
from compression.runtime import log


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass where a test says so."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()
    yield found
    log.manager._clear_cache()


def go(clock, rows, seconds):
    for _ in rows:
        clock[0] += seconds


def test_a_log_gets_a_line_a_minute_with_time_and_what_is_left(clock, lines):
    bar = progress(range(100), "counting")
    bar._time, bar.start_t, bar.last_print_t = (lambda: clock[0]), 0.0, 0.0
    go(clock, bar, 6)
    assert 8 <= len(lines) <= 10
    assert lines[0].startswith("counting: 1") and " of 100, 01:0" in lines[0] and lines[0].endswith(" to go")
    assert len(set(lines)) == len(lines) and not any("\r" in line for line in lines)


def test_what_is_quick_has_no_line(clock, lines):
    go(clock, progress(range(100), "counting"), 0.1)
    assert lines == []


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, clock, lines, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    go(clock, progress(range(5), "counting"), 100)
    assert "counting" in capsys.readouterr().err and lines == []


def test_of_several_processes_only_the_first_has_one(monkeypatch, clock, lines, capsys):
    monkeypatch.setattr(log, "level", logging.ERROR)
    log.manager._clear_cache()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    go(clock, progress(range(5), "counting"), 100)
    assert capsys.readouterr().err == ""


def test_bars_of_libraries_stay_out_of_logs(clock, lines, capsys):
    with bars_of_libraries():
        for _ in tqdm(range(100), desc="requests", mininterval=0):
            clock[0] += 1
    assert capsys.readouterr().err == ""
    assert len(lines) == 1 and lines[0].startswith("requests:") and "|" not in lines[0]
