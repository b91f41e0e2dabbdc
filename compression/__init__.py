"""Distillation, structured pruning and 4-bit quantization of transformers: what the numbered scripts share."""

import sys
from types import TracebackType


def _end_interrupts_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# The libraries that the scripts import take seconds, and Ctrl-C may come before `run_script` does.
sys.excepthook = _end_interrupts_in_one_line
