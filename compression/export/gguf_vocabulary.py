"""A tokenizer as GGUF describes it: tokens, their kinds, merges or scores, and how text is split before.

llama.cpp knows two kinds of byte-pair encoding: GPT-2's, whose tokens are made of bytes, with merges in an order
(`gpt2`), and SentencePiece's, whose tokens are made of characters and, where there is none, of bytes, with a score for
each token (`llama`). For the first it has its own code for each way to split text into words, by name.

It does not normalize text (Qwen's tokenizers do, to Unicode's form NFC). Where the second kind puts a space before a
text, llama.cpp also does so before one that begins with a space, and behind every special token.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from compression.runtime import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", False)
_BYTES_OF_WORDS = ("ByteLevel", True)
# llama.cpp's name for a way to split text -> the steps of a tokenizer.json that split it so.
PRE_TOKENIZERS: dict[str, list[tuple[Any, ...]]] = {
    "gpt-2": [_BYTES_OF_WORDS],
    "smollm": [("Digits", True), _BYTES_OF_WORDS],
    "llama-bpe": [("Split", _WORDS % r"\p{N}{1,3}"), _BYTES],
    "qwen2": [("Split", _WORDS % r"\p{N}"), _BYTES],
}
FLAG = "--tokenizer_pre"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    special: dict[str, int] = field(default_factory=dict)
    """Ids of bos, eos, unk and pad, where there are."""
    adds: dict[str, bool] = field(default_factory=dict)
    """Whether bos begins and eos ends a text."""
    chat_template: Any = None

    def write(self, writer: GGUFWriter) -> None:
        """Add the fields to a file's header."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        writer.add_add_space_prefix(self.space_prefix)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path, pre_tokenizer: str | None = None
) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        rows: of the model's embeddings; those without a token get an unused one.
        folder: the tokenizer's, for the error text.
        pre_tokenizer: llama.cpp's name for how a byte-level tokenizer splits text; None: it is one of PRE_TOKENIZERS.

    Raises:
        UserError: the tokenizer is of a kind that llama.cpp does not have, or splits text in an unknown way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    model = described.get("model", {})
    steps = _steps(described.get("pre_tokenizer"))
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        scores = _scores(tokenizer, model, rows)
        kind: dict[str, Any] = dict(model="llama", pre="default", scores=scores, space_prefix=_space_prefix(described))
    elif model.get("type") == "BPE" and any(name == "ByteLevel" for name, *_ in steps):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        kind = dict(model="gpt2", pre=pre_tokenizer or _name_of(steps, folder), merges=merges)
    else:
        found = model.get("type") or type(tokenizer).__name__
        raise UserError(
            f"{folder}: its tokenizer ({found}) cannot be written to GGUF; allowed is byte-pair encoding, of bytes or "
            "with byte fallback"
        )
    tokens, types = _tokens(tokenizer, described, rows)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    ids: Any = tokenizer("a")["input_ids"]
    return Vocabulary(
        tokens=tokens,
        types=types,
        special={name: token for name, token in special.items() if token is not None},
        adds={"bos": ids[0] == special["bos"], "eos": ids[-1] == special["eos"]},
        chat_template=_chat_template(tokenizer),
        **kind,
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """The steps of a pre-tokenizer, as PRE_TOKENIZERS names them."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [("ByteLevel", pre_tokenizer.get("use_regex", True))]
    if kind == "Digits":
        return [("Digits", pre_tokenizer["individual_digits"])]
    if kind == "Split" and (pre_tokenizer["behavior"], pre_tokenizer["invert"]) == ("Isolated", False):
        return [("Split", pre_tokenizer["pattern"].get("Regex"))]
    return [(kind, json.dumps(pre_tokenizer))]


def _name_of(steps: list[tuple[Any, ...]], folder: Path) -> str:
    for name, known in PRE_TOKENIZERS.items():
        if steps == known:
            return name
    raise UserError(
        f"{folder}: its tokenizer splits text in a way that is not one of {', '.join(PRE_TOKENIZERS)}; give "
        f"llama.cpp's name for it: {FLAG} NAME"
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], rows: int
) -> tuple[list[str], list[TokenType]]:
    """Text and kind of each token, by its id."""
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [TokenType.UNUSED] * rows
    with_bytes, unknown = described["model"].get("byte_fallback"), described["model"].get("unk_token")
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, TokenType.NORMAL
        if with_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[index] = TokenType.BYTE
    for added in described.get("added_tokens") or ():
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if with_bytes and unknown is not None:
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], rows: int) -> list[float]:
    """Of two pairs that could be merged llama.cpp takes the one of the higher score: that of the earlier merge."""
    scores, vocabulary = [-1e6] * rows, tokenizer.get_vocab()
    for rank, merge in reversed(list(enumerate(model["merges"]))):
        merged = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        scores[vocabulary[merged]] = -float(rank)
    return scores


def _space_prefix(described: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    normalizer, split = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    return split.get("prepend_scheme", "never") != "never" or any(part.get("type") == "Prepend" for part in parts)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        return [{"name": name, "template": template} for name, template in found.items()]
    return found
