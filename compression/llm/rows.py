"""Token sequences that a language model is trained on: windows of a text, or instructions with their responses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compression.batching import pad
from compression.integrity import digest_of
from compression.runtime import UserError, log
from compression.text_files import is_text, parse_json, read_json_lines, read_text

INSTRUCTION_FILES = (".json", ".jsonl")
# The sections that alpaca-style data is commonly laid out in.
PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True)
class Sequences:
    """Token ids per row (no padding), and for each row the place of the first token that is predicted, at least 1."""

    ids: list[list[int]]
    first: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.ids])

    @property
    def weights(self) -> Tensor:
        """Tokens that are predicted in each row: a batch's loss is the mean over its tokens."""
        return self.lengths - torch.tensor(self.first)

    def shortened(self, tokens: int) -> "Sequences":
        """The same rows, the last one without so many of its last tokens."""
        return Sequences([*self.ids[:-1], self.ids[-1][: len(self.ids[-1]) - tokens]], self.first)

    def digest(self) -> str:
        """A hash of what is predicted from what."""
        return digest_of(repr((self.ids, self.first)))

    def collate(self, rows: list[int], pad_token_id: int) -> dict[str, Tensor]:
        """A batch padded to its longest row: input_ids, attention_mask and bool targets [rows, length].

        `targets` marks the tokens that are predicted, each from those before it.
        """
        batch = pad({"input_ids": self.ids}, rows, pad_token_id)
        first = torch.tensor([self.first[row] for row in rows])
        later = torch.arange(batch["input_ids"].shape[1]) >= first[:, None]
        return batch | {"targets": later & batch["attention_mask"].bool()}


def budgeted(weights: Tensor, tokens: int, seed: int) -> tuple[list[int], int]:
    """Rows in random order that have a number of tokens to predict in all, none twice before each was there once.

    Args:
        weights: tokens to predict of each row, whole numbers above 0 [rows].

    Returns:
        The rows, and how many tokens at the end of the last one are beyond the number.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-tokens // int(weights.sum()))
    order = torch.cat([torch.randperm(len(weights), generator=generator) for _ in range(passes)])
    predicted = weights[order].cumsum(0)
    last = int(torch.searchsorted(predicted, tokens))
    return order[: last + 1].tolist(), int(predicted[last]) - tokens


def taken(rows: Sequences, tokens: int, seed: int) -> Sequences:
    """Rows in random order whose tokens to predict are as many, see `budgeted`; the last one is cut."""
    order, beyond = budgeted(rows.weights, tokens, seed)
    return Sequences([rows.ids[row] for row in order], [rows.first[row] for row in order]).shortened(beyond)


@dataclass(frozen=True)
class Packed:
    """Sequences joined to windows, so that little of a batch is padding.

    The tokens of a sequence see those of their own alone and have its positions: what is predicted from what is as
    without packing, and so is the loss.

    Args:
        rows: the sequences.
        windows: which of them lie in each window.
    """

    rows: Sequences
    windows: list[range]

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> Tensor:
        return self._sums(self.rows.lengths)

    @property
    def weights(self) -> Tensor:
        """Tokens that are predicted in each window."""
        return self._sums(self.rows.weights)

    def _sums(self, values: Tensor) -> Tensor:
        return torch.stack([values[window.start : window.stop].sum() for window in self.windows])

    def digest(self) -> str:
        """A hash of what is predicted from what, and in which windows."""
        return digest_of(repr((self.rows.digest(), self.windows)))

    def collate(self, rows: list[int], pad_token_id: int) -> dict[str, Tensor]:
        """A batch of windows as `Sequences.collate` has it, and position_ids [windows, length].

        Positions begin anew with each sequence, which tells transformers which tokens see each other.
        """
        inputs: dict[str, list[list[int]]] = {"input_ids": [], "targets": [], "position_ids": []}
        for row in rows:
            parts = [(self.rows.ids[place], self.rows.first[place]) for place in self.windows[row]]
            inputs["input_ids"].append([token for ids, _ in parts for token in ids])
            inputs["targets"].append([place >= first for ids, first in parts for place in range(len(ids))])
            inputs["position_ids"].append([place for ids, _ in parts for place in range(len(ids))])
        batch = pad(inputs, list(range(len(rows))), pad_token_id)
        return batch | {"targets": batch["targets"].bool()}


def packed(rows: Sequences, length: int) -> Packed:
    """All sequences, whole and in their order, in windows of at most `length` tokens.

    One that does not fit into what is left of a window begins the next one. Each ends in the end-of-text token where
    its tokenizer has one, so that token stands between any two.
    """
    windows, start, filled = [], 0, 0
    for row, size in enumerate(rows.lengths.tolist()):
        if filled + size > length and row > start:
            windows.append(range(start, row))
            start, filled = row, 0
        filled += size
    return Packed(rows, [*windows, range(start, len(rows))])


def of_windows(windows: Tensor) -> Sequences:
    """Windows [count, length] of a text, of which all tokens but the first are predicted."""
    return Sequences(windows.tolist(), [1] * len(windows))


def is_instruction_file(name: str) -> bool:
    """Whether the name is that of a file of instructions and not of a text."""
    return Path(name).suffix in INSTRUCTION_FILES


def read_instructions(path: Path, flag: str = "--dataset") -> list[dict[str, str]]:
    """Rows with `instruction`, `input` (may be empty or absent) and `output`.

    Args:
        path: a JSON list of objects, or JSON lines with an object each.
        flag: what named it, for error texts.

    Raises:
        UserError: the file is malformed; names the row.
    """
    rows = _parse(Path(path), flag)
    for number, row in rows:
        known = isinstance(row, dict) and {"input": ""} | row
        if not known or not all(is_text(known.get(name)) for name in ("instruction", "input", "output")):
            raise UserError(
                f"{flag} {path}: row {number} is {_shown(row)}; a row must have instruction, input and output as text"
            )
    if not rows:
        raise UserError(f"{flag} {path}: holds no rows; each must have instruction, input and output")
    return [row for _, row in rows]


def _shown(row: Any) -> str:
    """The start of a row, for error texts."""
    try:
        return json.dumps(row)[:60]
    except RecursionError:
        return f"a {type(row).__name__} that is nested too deeply"


def _parse(path: Path, flag: str) -> list[tuple[int, Any]]:
    """Rows with their numbers, from 1: those of the lines in a file of JSON lines."""
    if path.suffix == ".jsonl":
        return list(read_json_lines(path, flag))
    try:
        rows = parse_json(read_text(path, flag))
    except ValueError as error:
        raise UserError(f"{flag} {path}: is no valid JSON ({error}); mend the file or name another") from None
    if not isinstance(rows, list):
        raise UserError(f"{flag} {path}: holds a {type(rows).__name__}; allowed is a list of rows")
    return list(enumerate(rows, start=1))


def written_out(row: dict[str, str]) -> str:
    """A prompt with its response, as one text."""
    return _prompt(row) + row["output"]


def _prompt(row: dict[str, str]) -> str:
    return (PROMPT_WITH_INPUT if row.get("input") else PROMPT).format_map(row)


def of_instructions(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], max_length: int, train_on_inputs: bool
) -> Sequences:
    """Prompts with their responses and the end-of-text token, cut at `max_length` tokens.

    Args:
        rows: see `read_instructions`. A row whose prompt leaves no place for a response is left out.
        train_on_inputs: the prompt's tokens are predicted too, not the response's alone.

    Raises:
        UserError: no row is left.
    """
    ids, first = [], []
    for row in rows:
        prompt, response = _tokens(tokenizer, row)
        start = 1 if train_on_inputs else max(1, len(prompt))
        if start < min(len(prompt) + len(response), max_length):
            ids.append((prompt + response)[:max_length])
            first.append(start)
    if not ids:
        raise UserError(f"--max_length {max_length}: every prompt is longer, so no response is left; allow more tokens")
    if len(ids) < len(rows):
        log.info(
            "%d of %d rows left out: their prompts fill --max_length %d", len(rows) - len(ids), len(rows), max_length
        )
    return Sequences(ids, first)


def _tokens(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> tuple[list[int], list[int]]:
    prompt = tokenizer(_prompt(row))["input_ids"]
    response = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if prompt[-1:] == end:  # some tokenizers end every text
        prompt = prompt[:-1]
    return prompt, response + end
