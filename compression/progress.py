"""How far a long computation is: a bar on a terminal, a line a minute in a log."""

import io
import logging
import re
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import Any

from tqdm import tqdm

from compression.runtime import log

SECONDS = 60.0
"""Between two lines in a log."""
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} to go"


class _Lines(io.TextIOBase):
    """Takes what bars write; logs the latest of it once a minute."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> int:
        line = re.sub(r"\|.*\|", "", text.rsplit("\r", 1)[-1]).strip()
        if line and time.monotonic() - self.last >= SECONDS:
            log.info("%s", line)
            self.last = time.monotonic()
        return len(text)


def progress(rows: Iterable[Any] | None, description: str, total: int | None = None, initial: int = 0) -> "tqdm[Any]":
    """A bar over rows, or one to be moved on by its `update`. Of several processes the first one has it.

    Args:
        total: number of rows, where they do not say it themselves. initial: how many of them were done before.
    """
    shown: dict[str, Any] = dict(file=_Lines(), mininterval=1, maxinterval=SECONDS, bar_format=LINE)
    if sys.stderr.isatty():
        shown = {}
    quiet = not log.isEnabledFor(logging.INFO)
    return tqdm(rows, desc=description, total=total, initial=initial, leave=False, disable=quiet, **shown)


def bars_of_libraries() -> AbstractContextManager[Any]:
    """Bars that a library draws inside are bars on a terminal, and lines in a log."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(_Lines())
