"""The embedded film texts: review sentences, and plot summaries."""

import bz2
import csv
from collections.abc import Sequence
from pathlib import Path

from compression.classifier.parts import Split, TaskData
from compression.classifier.tasks import make_task
from compression.embedded import FILM_SHARES, ensure_reviews, part_of_film, reviews_file
from compression.runtime import UserError
from compression.sources import describe_source

CATEGORIES = ("rotten", "fresh", "plot")
REVIEWS3 = make_task("reviews3", ["text"], CATEGORIES)
"""Is it a bad review, a good one, or what a film is about? Of the texts 39, 53 and 8 %: not balanced."""


def split_by_film(path: Path, categories: Sequence[str]) -> dict[str, Split]:
    """The texts of these categories, numbered in their order, by part: train, selection and validation.

    No film is in two parts, with its reviews, which echo each other, and its plot. Of texts that are the same the first
    one counts.

    Args:
        path: a bz2-compressed CSV with columns category (fresh, rotten, plot), text and movie_name.
    """
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in categories]
    seen: set[str] = set()
    parts: dict[str, tuple[list[str], list[int]]] = {part: ([], []) for part in ("train", *FILM_SHARES)}
    for row in rows:
        text = " ".join(row["text"].split())
        if not text or text in seen:
            continue
        seen.add(text)
        sentences, labels = parts[part_of_film(row["movie_name"])]
        sentences.append(text)
        labels.append(categories.index(row["category"]))
    return {part: Split(*rows) for part, rows in parts.items()}


def load_reviews(data_dir: str | None = None) -> TaskData:
    """The task of three classes.

    Args:
        data_dir: a folder with `embedded/` and the file in it; None fetches that where it is not there yet.

    Raises:
        UserError: there is none in `data_dir`.
    """
    if data_dir is None:
        path = ensure_reviews(REVIEWS3.name)
    elif not (path := reviews_file(Path(data_dir).expanduser() / "embedded")).is_file():
        raise UserError(f"--data_dir {data_dir}: has no embedded/{path.name}; leave the flag out to fetch it")
    name = "Rotten Tomatoes reviews and plots (embedded)"
    return TaskData(REVIEWS3, name, describe_source(path.parent), **split_by_film(path, CATEGORIES))
