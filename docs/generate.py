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

from compression.classifier.gradual_pruning import MODES
from compression.files import write_text
from compression.llm import scoring
from compression.tables import Column, markdown_table

DOCS = Path(__file__).resolve().parent


def choices_table(title: str, entries: Mapping[str, Any]) -> str:
    """A table of a registry: the name of each entry, and its `help`."""
    columns = [
        Column(title, lambda entry: f"`{entry[0]}`"),
        Column("score of a structure", lambda entry: entry[1].help),
    ]
    return markdown_table(columns, list(entries.items()), align="---")


# The tables by the name that their markers have.
TABLES: dict[str, Callable[[], str]] = {
    "modes": lambda: choices_table("mode", MODES),
    "scores": lambda: scoring.scores_markdown(),
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
