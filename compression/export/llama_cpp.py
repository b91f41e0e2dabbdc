"""GGUF files run by llama.cpp: logits, perplexity, tokens, speed. Needs the package xllamacpp, see `llama_worker`."""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from compression.runtime import UserError

WORKER = Path(__file__).with_name("llama_worker.py")


def is_installed() -> bool:
    """Whether llama.cpp is there."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A process that runs llama.cpp; it ends with the context.

    A file is loaded when it is first named, and stays loaded.

    Args:
        threads: that compute; None: as many as PyTorch uses.

    Every method raises UserError where llama.cpp cannot load the file, or stops at it; says what llama.cpp said.
    """

    def __init__(self, threads: int | None = None):
        if not is_installed():
            raise UserError("llama.cpp is not installed; install it with: pip install -r requirements.txt")
        self.threads = threads or torch.get_num_threads()

    def __enter__(self) -> Self:
        self.said = TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self.connection, other = Pipe()
        # Without the folder of the worker's file on its path: modules there have the names of libraries.
        command = [sys.executable, "-P", str(WORKER), str(other.fileno()), str(self.threads)]
        self.process = subprocess.Popen(command, stderr=self.said, pass_fds=[other.fileno()])
        other.close()
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()
        self.process.wait()
        self.said.close()

    def _ask(self, method: str, path: Path, *arguments: Any) -> Any:
        try:
            self.connection.send((method, (str(path), *arguments)))
            answer, problem = self.connection.recv()
        except (EOFError, OSError):
            answer, problem = None, self._last_words()
        if problem is not None:
            raise UserError(
                f"{path}: llama.cpp cannot run it ({problem}); export the model again, with the xllamacpp of "
                "requirements.txt"
            )
        return answer

    def _last_words(self) -> str:
        """What a process that has ended said first: llama.cpp's assertion, before its stack."""
        status = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in lines if line.strip()), f"it ended with status {status}")

    def forget(self, path: Path) -> None:
        """Let go of a file that was named before."""
        self._ask("forget", path)

    def tokenize(self, path: Path, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """A text's token ids.

        Args:
            add_special: with the tokens that begin or end a text, where the model has them.
            parse_special: tokens that control the model are looked for in the text.
        """
        return self._ask("tokenize", path, text, add_special, parse_special)

    def chat_template(self, path: Path) -> str | None:
        """The template of a chat that lies in the file."""
        return self._ask("chat_template", path)

    def logits(self, path: Path, ids: Sequence[int]) -> np.ndarray:
        """fp32 [tokens, vocabulary] behind each token of a text. Attention is computed in fp32."""
        return self._ask("logits", path, list(ids))

    def perplexity(self, path: Path, windows: Tensor) -> float:
        """Perplexity on windows of token ids [count, length], as `llm.perplexity` defines it and llama.cpp computes by
        default: attention in 16 bits."""
        losses = [self._ask("losses", path, window.tolist()) for window in windows]
        return math.exp(np.mean(losses))

    def speed(self, path: Path, prompt_length: int, new_tokens: int) -> tuple[float, float]:
        """Tokens per second at batch 1: of a prompt that is read at once (in pieces of `llama_worker.CHUNK`), and of
        tokens behind it that are computed one after the other."""
        prefill, decode = self._ask("speed", path, prompt_length, new_tokens)
        return prompt_length / prefill, new_tokens / decode
