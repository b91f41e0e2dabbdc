"""Hooks that do not outlive what they are for."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens; given a generator, also register them only now."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
