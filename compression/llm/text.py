"""Plain text for language models: where it comes from, and its tokens in windows of one length.

Calibration takes `train`, choices take `validation`, reported perplexities take `test`: no part serves two ends.
"""

import bz2
import csv
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.assets import NotOnHub, hub_answers, hub_snapshot
from compression.embedded import ensure_reviews, part_of_film
from compression.integrity import digest_of
from compression.llm.rows import is_instruction_file, read_instructions, written_out
from compression.runtime import UserError, first_line, log
from compression.text_files import read_text

Part = Literal["train", "validation", "test"]
# Texts by name: files of each part under --data_dir, the first that is there (WikiText-2's raw form before its
# tokenised one); embedded texts have none.
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "wikitext2": {
        "train": ("wiki.train.raw", "wiki.train.tokens"),
        "validation": ("wiki.valid.raw", "wiki.valid.tokens"),
        "test": ("wiki.test.raw", "wiki.test.tokens"),
    },
    "ptb": {"train": ("ptb.train.txt",), "validation": ("ptb.valid.txt",), "test": ("ptb.test.txt",)},
    "c4": {"train": ("c4.train.txt",), "validation": ("c4.validation.txt",), "test": ("c4.test.txt",)},
    "fineweb-edu": {part: (f"fineweb-edu.{part}.txt",) for part in ("train", "validation", "test")},
    "plots": {},
    "reviews": {},
}
# Repository on the hub, its file of each part, the column of text, and how many rows are read of it (None: all).
HUB: dict[str, tuple[str, dict[str, str], str, int | None]] = {
    "wikitext2": (
        "Salesforce/wikitext",
        {part: f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet" for part in ("train", "validation", "test")},
        "text",
        None,
    ),
    "c4": (
        "allenai/c4",
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00001-of-00008.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
        "text",
        2000,
    ),
}
# The same for a data set of which no file is small: its repository on the hub, configuration and column, and the rows
# of each part, which are read over the network until there are enough.
STREAMED: dict[str, tuple[str, str, str, dict[str, slice]]] = {
    "fineweb-edu": (
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        "text",
        {"test": slice(0, 500), "validation": slice(500, 1000), "train": slice(1000, 3000)},
    )
}
PARTS_OF_A_FILE = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
PARTS_OF_FILMS = {"train": "train", "selection": "validation", "validation": "test"}
EMBEDDED = {"plots": "film plot summaries (embedded)", "reviews": "film reviews (embedded)"}


@dataclass(frozen=True)
class Corpus:
    """One part of a text collection, and what reports call it."""

    name: str
    part: Part
    source: str
    text: str

    def describe(self) -> dict[str, str]:
        """What a report says about the text."""
        return {"name": self.name, "part": self.part, "source": self.source, "sha256": digest_of(self.text, 16)}


def load_corpus(
    name: str, part: Part, data_dir: str | None = None, use_hub: bool = True, flag: str = "--dataset"
) -> Corpus:
    """Load one part of a text collection.

    Rows (lines of a file) are joined by blank lines, as is usual for perplexities on WikiText-2.

    Args:
        name: one of `FILES`, or the path of a file, whose first 80 % are `train`, then 10 % `validation` and 10 %
            `test`: a text, or instructions (.json, .jsonl), which are written out.
        data_dir: a folder with files such as `wikitext2/wiki.test.raw` or `ptb/ptb.test.txt`. Without it the hub is
            asked, and for wikitext2 the embedded film plots stand in where there is no hub.
        flag: what named the text, for error texts.

    Raises:
        UserError: there is no such text; says which files are looked for. Or it is not text in UTF-8.
    """
    if os.path.isfile(name):  # False for any path that cannot be looked at: too long, a loop of links
        return _part_of_file(Path(name), part, flag)
    if name not in FILES:
        raise UserError(f"text {name!r}: no such file; allowed is a text file or one of {', '.join(FILES)}")
    if name in EMBEDDED:
        return _embedded(name, part, name)
    if data_dir is not None:
        return _from_folder(name, part, Path(data_dir).expanduser())
    try:
        return _streamed(name, part, use_hub) if name in STREAMED else _from_hub(name, part, use_hub)
    except NotOnHub as problem:
        if name != "wikitext2":
            raise UserError(
                f"text {name}: {problem}; give a folder with {name}/{FILES[name][part][0]}: --data_dir"
            ) from None
        log.info("wikitext2: %s; taking %s", problem, EMBEDDED["plots"])
    return _embedded("plots", part, "WikiText-2")


def is_known(name: str) -> bool:
    """Whether a name is that of a text, or of a file."""
    return name in FILES or os.path.isfile(name)


def _part_of_file(path: Path, part: Part, flag: str) -> Corpus:
    if is_instruction_file(path.name):
        text = "\n\n".join(written_out(row) for row in read_instructions(path, flag))
    else:
        text = read_text(path, flag)
    first, last = (int(share * len(text)) for share in PARTS_OF_A_FILE[part])
    return Corpus(path.name, part, "a local file", text[first:last])


def _from_folder(name: str, part: Part, folder: Path) -> Corpus:
    for file in FILES[name][part]:
        if os.path.lexists(path := folder / name / file):
            lines = read_text(path, "--data_dir").splitlines()
            return Corpus(name, part, "a local folder", _join(lines))
    wanted = " or ".join(f"{name}/{file}" for file in FILES[name][part])
    raise UserError(f"--data_dir {folder}: has no {wanted}; name another folder, or leave the flag out to ask the hub")


def _from_hub(name: str, part: Part, use_hub: bool) -> Corpus:
    if name not in HUB:
        raise NotOnHub("it is not on the hub")
    repository, files, column, limit = HUB[name]
    snapshot = hub_snapshot(repository, "dataset", [files[part]], use_hub)
    from datasets import load_dataset

    kind = "parquet" if files[part].endswith("parquet") else "json"
    rows = load_dataset(kind, data_files=str(snapshot / files[part]), split="train")[:limit][column]
    return Corpus(name, part, f"hub {repository} {snapshot.name[:12]}", _join([row.rstrip("\n") for row in rows]))


def _streamed(name: str, part: Part, use_hub: bool) -> Corpus:
    repository, configuration, column, rows = STREAMED[name]
    if not use_hub or not hub_answers():
        raise NotOnHub("it is read from the hub, which is not reachable" if use_hub else "the hub is not to be asked")
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repository).sha
        stream = load_dataset(repository, configuration, split="train", streaming=True, revision=commit)
        texts = [row[column].rstrip("\n") for row in islice(stream, rows[part].start, rows[part].stop)]
    except Exception as error:  # of several libraries; whichever it is, the text was not read
        raise NotOnHub(first_line(error)) from error
    return Corpus(name, part, f"hub {repository} {str(commit)[:12]}", _join(texts))


def _embedded(name: str, part: Part, stands_for: str) -> Corpus:
    """The plots or the reviews of the part's films."""
    with bz2.open(ensure_reviews(stands_for), "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["category"] == "plot") == (name == "plots")]
    mine = [row["text"] for row in rows if PARTS_OF_FILMS[part_of_film(row["movie_name"])] == part]
    return Corpus(EMBEDDED[name], part, "embedded", _join([" ".join(text.split()) for text in mine]))


def _join(rows: list[str]) -> str:
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def tokenize(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, limit: int | None = None) -> Tensor:
    """Token ids of the whole text, [tokens], with no special tokens; with a limit only about that number."""
    text = corpus.text if limit is None else corpus.text[: 12 * limit]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:limit])


def windows(ids: Tensor, length: int, name: str = "the text") -> Tensor:
    """Consecutive windows [count, length] of a text; what is left at its end is dropped.

    Raises:
        UserError: the text is shorter than one window.
    """
    if len(ids) < length:
        raise UserError(f"{name} has {len(ids)} tokens, less than one window of {length}; use a shorter window")
    return ids[: len(ids) // length * length].view(-1, length)


def sample_windows(ids: Tensor, length: int, count: int, seed: int, name: str = "the text") -> Tensor:
    """Random windows [count, length] that do not overlap (all there are, if there are fewer)."""
    every = windows(ids, length, name)
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    return every[chosen.sort().values]


@dataclass(frozen=True)
class CalibrationText:
    """Token ids [count, length]: what scores are computed on, what repairs are fitted to, what choices are made by.

    Attributes:
        seed: of what is drawn for these windows.
    """

    scores: Tensor
    repair: Tensor
    held_out: Tensor
    batch_size: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0
