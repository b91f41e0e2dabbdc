"""llama.cpp in a process of its own: what `llama_cpp.LlamaCpp` starts, and talks to.

The package xllamacpp brings llama.cpp prebuilt, and its library exports llama.cpp's C functions (`llama.h`), which give
what its server does not: the logits of every position of a text in one pass. llama.cpp aborts the process on a failed
assertion, so nothing else is done in it, and nothing of this project is imported.
"""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import xllamacpp.xllamacpp

CHUNK = 256
"""Tokens that are computed at once; llama.cpp keeps the logits of that many."""
F32 = 0  # ggml's number of that data type
ERROR = 4  # ggml's level of a log line


class _ContextParams(ctypes.Structure):
    """llama_context_params: the fields that are set here, and enough bytes for those behind them."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("before_attention", c_uint8 * 36),
        ("flash_attn_type", c_int32),
        ("before_cache", c_uint8 * 48),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_uint8 * 400),
    ]

    def check(self) -> None:
        """Raise RuntimeError where the library's own defaults do not lie where they are expected."""
        found = (
            self.n_ctx,
            self.n_batch,
            self.n_ubatch,
            self.n_seq_max,
            self.flash_attn_type,
            self.type_k,
            self.type_v,
        )
        if found != (512, 2048, 512, 1, -1, 1, 1):
            raise RuntimeError(f"its llama_context_params has another layout (defaults {found})")


class _ModelParams(ctypes.Structure):
    _fields_ = [("all", c_uint8 * 512)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_said: list[str] = []
"""Errors that llama.cpp has logged since the last request."""


@CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _log_errors(level: int, line: bytes, _: Any) -> None:
    if level == ERROR:
        _said.append(line.decode(errors="replace").strip())


def _library() -> Any:
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointers = "model_load_from_file init_from_model model_get_vocab get_memory"
    for name in pointers.split():
        getattr(library, f"llama_{name}").restype = c_void_p
    library.llama_get_logits.restype = POINTER(c_float)
    library.llama_model_default_params.restype = _ModelParams
    library.llama_context_default_params.restype = _ContextParams
    library.llama_batch_init.restype = _Batch
    library.llama_model_chat_template.restype = c_char_p
    return library


class Engine:
    """Models of llama.cpp, by name."""

    def __init__(self, threads: int):
        self.library, self.threads = _library(), threads
        self.library.llama_context_default_params().check()
        self.library.llama_log_set(_log_errors, None)
        self.library.llama_backend_init()
        self.models: dict[str, c_void_p] = {}

    def _model(self, path: str) -> c_void_p:
        """A file's model, loaded when it is first asked for."""
        if path not in self.models:
            parameters = self.library.llama_model_default_params()
            model = self.library.llama_model_load_from_file(path.encode(), parameters)
            if not model:
                raise RuntimeError("it does not load")
            self.models[path] = c_void_p(model)
        return self.models[path]

    def vocabulary_size(self, path: str) -> int:
        return self.library.llama_vocab_n_tokens(self._vocabulary(path))

    def forget(self, path: str) -> None:
        self.library.llama_model_free(self.models.pop(path))

    def _vocabulary(self, path: str) -> c_void_p:
        return c_void_p(self.library.llama_model_get_vocab(self._model(path)))

    def tokenize(self, path: str, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 16))()
        options = c_bool(add_special), c_bool(parse_special)
        count = self.library.llama_tokenize(self._vocabulary(path), raw, len(raw), ids, len(ids), *options)
        return list(ids[:count])

    def chat_template(self, path: str) -> str | None:
        found = self.library.llama_model_chat_template(self._model(path), None)
        return None if found is None else found.decode()

    def logits(self, path: str, ids: list[int]) -> np.ndarray:
        """fp32 [tokens, vocabulary]."""
        return np.concatenate([chunk for _, chunk in self._forward(path, ids, exact=True)])

    def losses(self, path: str, ids: list[int]) -> list[float]:
        """Negative log-likelihood of each token but the first; attention as llama.cpp does it by default."""
        found: list[float] = []
        for place, logits in self._forward(path, ids, exact=False):
            targets = np.array(ids[place + 1 : place + 1 + len(logits)], dtype=np.int64)
            rows = logits[: len(targets)].astype(np.float64)
            largest = rows.max(axis=1)
            normalizers = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))
            found += (normalizers - rows[np.arange(len(targets)), targets]).tolist()
        return found

    def speed(self, path: str, prompt_length: int, new_tokens: int) -> tuple[float, float]:
        """Seconds to read a prompt, and to compute a number of tokens behind it, one after the other.

        Attention as llama.cpp does it by default, with a 16-bit cache; logits of the last token alone.
        """
        vocabulary = self.vocabulary_size(path)
        ids = np.random.default_rng(0).integers(vocabulary, size=prompt_length + new_tokens).tolist()
        with _Context(self, path, prompt_length + new_tokens, exact=False) as context:
            context.decode(ids[:1], 0, every=False)  # what is set up at the first call
            context.clear()
            times = [time.perf_counter()]
            for place in range(0, prompt_length, CHUNK):
                context.decode(ids[place : min(place + CHUNK, prompt_length)], place, every=False)
            times.append(time.perf_counter())
            for place in range(prompt_length, prompt_length + new_tokens):
                context.decode(ids[place : place + 1], place, every=False)
            times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1]

    def _forward(self, path: str, ids: list[int], exact: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of a piece of a text after the other, and where each begins."""
        with _Context(self, path, len(ids), exact) as context:
            for place in range(0, len(ids), CHUNK):
                yield place, context.decode(ids[place : place + CHUNK], place, every=True)


class _Context:
    """A key-value cache of one text.

    Args:
        exact: attention in 32 bits, not llama.cpp's default of 16.
    """

    def __init__(self, engine: Engine, path: str, length: int, exact: bool):
        self.library = engine.library
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = length, CHUNK, CHUNK
        if exact:
            parameters.type_k = parameters.type_v = F32
            parameters.flash_attn_type = 0  # its products are in 16 bits
        self.vocabulary = engine.vocabulary_size(path)
        self.pointer = c_void_p(self.library.llama_init_from_model(engine._model(path), parameters))
        if not self.pointer:
            raise RuntimeError("llama_init_from_model failed")
        self.library.llama_set_n_threads(self.pointer, engine.threads, engine.threads)
        self.batch = self.library.llama_batch_init(CHUNK, 0, 1)

    def __enter__(self) -> "_Context":
        return self

    def __exit__(self, *_: Any) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.pointer)

    def clear(self) -> None:
        self.library.llama_memory_clear(c_void_p(self.library.llama_get_memory(self.pointer)), c_bool(True))

    def decode(self, ids: list[int], place: int, every: bool) -> np.ndarray:
        """The logits of every token, or the last, fp32 [tokens, vocabulary].

        Args:
            place: position of the first.
        """
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, place + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == count - 1
        status = self.library.llama_decode(self.pointer, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        rows = count if every else 1
        self.library.llama_synchronize(self.pointer)
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.pointer), (rows, self.vocabulary)).copy()


def main() -> None:
    """Answer requests (method, arguments) until the other side is gone; an answer is a result, or what went wrong."""
    connection = Connection(int(sys.argv[1]))
    engine = None
    with suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            _said.clear()
            try:
                engine = engine or Engine(int(sys.argv[2]))
                connection.send((getattr(engine, method)(*arguments), None))
            except Exception as error:  # whatever it is, the one who asked is told
                connection.send((None, "; ".join([*_said, str(error)])))


if __name__ == "__main__":
    main()
