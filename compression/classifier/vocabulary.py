"""A tokenizer with fewer tokens, which splits given texts as before and can still spell any other."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from compression.runtime import UserError

FLAG = "--trim_vocabulary"
TOKENIZER_FILE = "tokenizer.json"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Described = dict[str, Any]
"""A part of what `tokenizer.json` holds."""
Places = dict[int, int]
"""Old id -> new id, in the order of both."""


def split(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, of whatever length."""
    options = dict(truncation=False, padding=False, return_attention_mask=False, return_token_type_ids=False)
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]


def trimmed(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], needed: Iterable[int] = ()
) -> tuple[PreTrainedTokenizerBase, Places]:
    """A tokenizer without the tokens that no text needs, and the ids that stay.

    What stays, besides the tokens of the texts: special and added tokens, every single character and byte, and what
    the kind of tokenizer needs so that texts are split as before (`KINDS`). The order of the ids stays, too.

    Args:
        needed: ids that stay whatever the texts are.

    Raises:
        UserError: the tokenizer is of a kind that cannot be trimmed, or splits one of the texts otherwise then.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(backend.model).__name__ if isinstance(backend, Tokenizer) else None
    if not isinstance(backend, Tokenizer) or kind not in KINDS:
        found = kind or f"{type(tokenizer).__name__}, which has no fast form,"
        raise UserError(f"{FLAG}: the tokenizer is {found}; allowed are {', '.join(KINDS)}; leave the flag out")
    rows = split(tokenizer, texts)
    described = json.loads(backend.to_str())
    ids, model = tokenizer.get_vocab(), described["model"]
    always = {token for token in ids if len(_bare(token, model)) == 1 or BYTE.fullmatch(token)}
    stay = {*chain.from_iterable(rows), *needed, *tokenizer.all_special_ids, model.get("unk_id")}
    stay |= {ids.get(token) for token in (*always, model.get("unk_token"))}
    stay |= {token["id"] for token in described["added_tokens"]}
    kept = KINDS[kind](model, {token for token, place in ids.items() if place in stay})
    places = {old: new for new, old in enumerate(sorted(ids[token] for token in kept))}
    small = _loaded(tokenizer, _renumbered(described, places))
    for text, old, new in zip(texts, rows, split(small, texts), strict=True):
        if [places[place] for place in old] != new:
            raise UserError(f"{FLAG}: the training text {text[:80]!r} would be split otherwise; leave the flag out")
    return small, places


# What a kind of tokenizer needs: tokens that stay -> all that have to stay with them.


def _of_word_piece(model: Described, tokens: set[str]) -> set[str]:
    """Nothing more: of the pieces that begin the rest of a word the longest is taken, and it is still the longest."""
    return tokens


def _of_bpe(model: Described, tokens: set[str]) -> set[str]:
    """The parts that tokens are merged from, and theirs: every merge that was done is then still there."""
    parts: dict[str, set[str]] = {}
    for pair in model["merges"]:
        parts.setdefault(_merged(pair, model), set()).update(pair)
    found, queue = set(tokens), list(tokens)
    while queue:
        new = parts.get(queue.pop(), set()) - found
        found |= new
        queue += new
    return found


def _of_unigram(model: Described, tokens: set[str]) -> set[str]:
    """The least probable piece, by whose score an unknown character's is set. A text's best path stays the best."""
    least, _ = min(model["vocab"], key=lambda entry: entry[1])
    return tokens | {least}


KINDS: dict[str, Callable[[Described, set[str]], set[str]]] = {
    "WordPiece": _of_word_piece,
    "BPE": _of_bpe,
    "Unigram": _of_unigram,
}


def _bare(token: str, model: Described) -> str:
    """A token without what marks it as a word's rest or end."""
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    return token.removeprefix(prefix).removesuffix(suffix)


def _merged(pair: Sequence[str], model: Described) -> str:
    """The token that two make."""
    first, second = pair
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


# The tokenizer's file.


def _renumbered(described: Described, places: Places) -> Described:
    """A tokenizer's description with the tokens that stay, under their new ids."""
    model = described["model"]
    if isinstance(model["vocab"], list):
        vocab: Any = [entry for place, entry in enumerate(model["vocab"]) if place in places]
    else:
        vocab = {token: places[place] for token, place in model["vocab"].items() if place in places}
    model = model | {"vocab": vocab}
    if model.get("unk_id") is not None:
        model["unk_id"] = places[model["unk_id"]]
    if "merges" in model:
        model["merges"] = [
            [first, second] for first, second in model["merges"] if _merged((first, second), model) in vocab
        ]
    added = [token | {"id": places[token["id"]]} for token in described["added_tokens"]]
    padding = described.get("padding")
    if padding is not None:
        padding = padding | {"pad_id": places[padding["pad_id"]]}
    processor = _renumbered_processor(described.get("post_processor"), places)
    return described | {"model": model, "added_tokens": added, "padding": padding, "post_processor": processor}


def _renumbered_processor(processor: Described | None, places: Places) -> Described | None:
    """What puts special tokens around a text, with their new ids."""
    if processor is None:
        return None
    renumbered = dict(processor)
    if "processors" in processor:
        renumbered["processors"] = [_renumbered_processor(part, places) for part in processor["processors"]]
    for name in {"sep", "cls"} & processor.keys():
        token, place = processor[name]
        renumbered[name] = [token, places[place]]
    if "special_tokens" in processor:
        renumbered["special_tokens"] = {
            name: token | {"ids": [places[place] for place in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return renumbered


def _loaded(tokenizer: PreTrainedTokenizerBase, described: Described) -> PreTrainedTokenizerBase:
    """The tokenizer as it is once it is saved with another `tokenizer.json` and loaded: classes rebuild parts of it."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, TOKENIZER_FILE).write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        return type(tokenizer).from_pretrained(folder)
