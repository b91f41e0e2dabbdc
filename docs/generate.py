"""Write the tables of the documentation that are made from registries.

    python docs/generate.py

In docs/*.md a table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.classifier.structure_scores import MODES
from compression.export import gguf, onnx
from compression.files import write_text
from compression.llm import scoring
from compression.llm.memory import JOBS, SHAPES, Shape, fits, pruning_disk
from compression.tables import Column, markdown_table

DOCS = Path(__file__).resolve().parent


def choices_table(title: str, entries: Mapping[str, Any], about: str = "score of a structure") -> str:
    """A table of a registry: the name of each entry, and its `help`."""
    columns = [Column(title, lambda entry: f"`{entry[0]}`"), Column(about, lambda entry: entry[1].help)]
    return markdown_table(columns, list(entries.items()), align="---")


CARDS = (8, 24, 40, 80)
"""Memory of usual GPUs, in 10^9 bytes."""


def memory_table() -> str:
    """What each job takes on a device by formula, and the smallest card that it fits."""

    def cell(job: Callable[[Shape], int], shape: Shape) -> str:
        needed = job(shape)
        card = next((f"{size} GB" for size in CARDS if fits(needed, size * 10**9)), "none")
        return f"{needed / 1e9:,.1f} ({card})"

    columns = [Column("GB on each device (card)", lambda job: job[0])]
    columns += [Column(name, lambda job, shape=shape: cell(job[1], shape)) for name, shape in SHAPES.items()]
    return markdown_table(columns, list(JOBS.items()))


def disk_table() -> str:
    """What a streamed pruning run takes on the disk."""
    columns = [
        Column("GB on the disk", lambda shape: shape[0]),
        Column("dense and pruned model, and states", lambda shape: pruning_disk(shape[1]) / 1e9, "{:,.0f}"),
    ]
    return markdown_table(columns, list(SHAPES.items()))


# The tables by the name that their markers have.
TABLES: dict[str, Callable[[], str]] = {
    "modes": lambda: choices_table("mode", MODES),
    "scores": lambda: scoring.scores_markdown(),
    "memory": memory_table,
    "disk": disk_table,
    "onnx": lambda: choices_table("--precision", onnx.PRECISIONS, "what is stored and computed"),
    "gguf": lambda: choices_table("--precision", gguf.PRECISIONS, "what matrices are stored in"),
}


def generated(text: str) -> str:
    """A page with its tables as they should be."""

    def table(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return f"{begin}\n\n{TABLES[name]()}\n\n{end}"

    return re.sub(r"(<!-- (\w+):begin -->).*?(<!-- \2:end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if generated(text) != text:
            write_text(page, generated(text))
            print(f"docs/{page.name}: rewritten")


if __name__ == "__main__":
    main()
