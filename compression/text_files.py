"""Files of text and JSON that a user gives: read strictly, so that nothing else is taken for text."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression.runtime import UserError

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, flag: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; any line end becomes a newline.

    Args:
        flag: what named the file, for error texts.

    Raises:
        UserError: the file cannot be read, is empty, or is not UTF-8 text; names the first byte that is not.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}); allowed is a text file") from None
    if not data:
        raise UserError(f"{flag} {path}: is empty; name a file that holds text")
    if data.startswith(UTF_16_MARKS):
        raise _not_utf8(path, flag, 0, "begins as UTF-16", "UTF-16")
    if b"\0" in data:
        raise _not_utf8(path, flag, data.index(b"\0"), "is zero, so this is binary or UTF-16", "UTF-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts behind the mark that it has dropped.
        place = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        raise _not_utf8(path, flag, place, f"is 0x{data[place]:02x}", "LATIN1") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(path: Path, flag: str, place: int, what: str, likely: str) -> UserError:
    return UserError(
        f"{flag} {path}: byte {place} {what}; allowed is text in UTF-8, other text becomes that with: "
        f"iconv -f {likely} -t UTF-8"
    )


def read_json_lines(path: Path, flag: str) -> Iterator[tuple[int, Any]]:
    """The value of each line of a JSON lines file with the line's number, from 1; blank lines are passed over.

    Raises:
        UserError: the file is not UTF-8 text, or a line is not JSON; names the line.
    """
    for number, line in enumerate(read_text(path, flag).split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{flag} {path}: is no valid JSON lines (line {number}: {error}); mend the file or name another"
                ) from None


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: the text is not JSON, or nested too deeply to be data.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written down: JSON can spell halves of characters."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
