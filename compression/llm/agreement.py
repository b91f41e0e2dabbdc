"""How far a smaller model's predictions are from the dense model's, on text that it was not calibrated or trained on.

Perplexity on text like what it has seen flatters a model; the divergence from the dense model on other text shows what
was lost. Of the dense model no more is kept than its last hidden states [windows, length, hidden]: the
logits of both models are computed anew from these, a few tokens at a time.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compression.checkpoint import check_positions
from compression.config import AtLeast, Originally, Settings
from compression.decoder import Decoder, decoder_of
from compression.distillation import soft_label_losses
from compression.llm.head import in_blocks
from compression.llm.layerwise import final_states
from compression.llm.mixture import same_text
from compression.llm.perplexity import exp_of_mean
from compression.llm.text import EMBEDDED, FILES, Corpus, is_known, load_corpus, sample_windows, tokenize
from compression.runtime import UserError, from_main_process, log, sum_over_processes
from compression.text_files import read_json_lines

# Zero-shot data with passages of text, by preference, and the passage of a row.
PASSAGES: dict[str, Callable[[Any], str]] = {
    "hellaswag": lambda row: f"{row['query']} {row['choices'][row['gold']]}",
    "boolq": lambda row: row["passage"].strip(),
}
FAST_AGREEMENT = dict(agreement_samples=2)


@dataclass
class Agreement(Settings):
    """On which text a model's predictions are compared with the dense model's."""

    agreement_text: Annotated[str, Originally("none")] = "auto"
    """Text that neither calibration nor training has seen, for KL and agreement with the dense model: a name or file as
    of --dataset; auto: passages of zeroshot/ in data_dir (hellaswag, boolq), else film plots, else film reviews; or
    none."""
    agreement_samples: Annotated[int, AtLeast(1), Originally(8)] = 8
    """Windows of it."""
    agreement_length: Annotated[int, AtLeast(2), Originally(512)] = 512
    """Tokens per window there."""

    def check(self) -> None:
        if self.agreement_text not in ("auto", "none") and not is_known(self.agreement_text):
            raise UserError(
                f"--agreement_text {self.agreement_text}: no such file; allowed are auto, none, a text file, a file of "
                f"instructions (.json, .jsonl) and {', '.join(FILES)}"
            )

    def check_unseen(self, calibrated: Collection[str]) -> None:
        """Raise UserError where the text is one of those that calibration or training takes."""
        if any(same_text(self.agreement_text, name) for name in calibrated):
            raise UserError(f"--agreement_text {self.agreement_text}: is in --dataset; name another text, or none")


@dataclass(frozen=True)
class Unseen:
    """Text that neither calibration nor training has seen: where it is from, and token ids [count, length]."""

    corpus: Corpus
    windows: Tensor


@dataclass(frozen=True)
class Reference:
    """What the dense model says of such a text, to compare other models with.

    Attributes:
        states: see `last_states`.
        head: the dense model's; None: it is the other models' own, which pruning leaves as it is.
    """

    text: Unseen
    states: Tensor
    head: nn.Module | None = None

    def compare(self, model: PreTrainedModel, batch_size: int = 1) -> dict[str, Any]:
        """How far a model's predictions are from the dense one's: see `agreement`; and on which text. Logs it."""
        windows, logits = self.text.windows, None
        if self.head is not None:
            logits = partial(_logits_by, decoder_of(model), deepcopy(self.head).to(model.device))
        found = agreement(model, windows, self.states, logits, batch_size)
        log.info(
            "On %s, not calibrated or trained on (%d windows of %d tokens): KL to the dense model %.3f, same first "
            "choice %.1f %%, perplexity %.2f -> %.2f",
            self.text.corpus.name,
            *windows.shape,
            found["kl"],
            100 * found["top1"],
            *found["perplexity"].values(),
        )
        return found | {"text": self.text.corpus.describe(), "windows": list(windows.shape)}


def _logits_by(decoder: Decoder, head: nn.Module, states: Tensor) -> Tensor:
    """Logits by another model's head, in its own type."""
    return decoder.logits(states.to(next(head.parameters()).dtype), head=head)


def unseen_text(
    settings: Agreement,
    seen: Collection[str],
    data_dir: str | None,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> Unseen | None:
    """The text that models are compared on; None where there is none, which is logged unless it was asked for.

    Args:
        seen: what the texts of calibration and training are called, see `Corpus.name`.
        seed: of which windows are taken.

    Raises:
        UserError: a text that was asked for is not there or shorter than a window, or windows beyond the model's
            positions.
    """
    if settings.agreement_text == "none":
        return None
    if settings.agreement_text == "auto":
        corpus, problem = None, "all there is has been seen"
        try:
            corpus = _pick(seen, data_dir)
        except UserError as error:
            problem = str(error)
        missing = from_main_process(lambda: corpus is None)  # all of them compare, or none
        if missing or corpus is None:
            log.info("Agreement with the dense model: left out (%s); name a text: --agreement_text", problem)
            return None
    else:
        corpus = load_corpus(settings.agreement_text, "test", data_dir, flag="--agreement_text")
    check_positions(model, "agreement_length", settings.agreement_length)
    ids = tokenize(tokenizer, corpus)
    return Unseen(corpus, sample_windows(ids, settings.agreement_length, settings.agreement_samples, seed, corpus.name))


def _pick(seen: Collection[str], data_dir: str | None) -> Corpus | None:
    """The first text that is there and has not been seen."""
    for task in PASSAGES if data_dir is not None else ():
        path = Path(str(data_dir)).expanduser() / "zeroshot" / task / "validation.jsonl"
        if path.is_file():
            text = "\n\n".join(read_passages(path, PASSAGES[task]))
            return Corpus(f"{task} passages", "validation", "a local folder", text)
    return next((load_corpus(name, "test") for name, title in EMBEDDED.items() if title not in seen), None)


def read_passages(path: Path, passage_of: Callable[[Any], str]) -> list[str]:
    """The passages of a file of zero-shot data in --data_dir, each once: several questions are about one.

    Args:
        passage_of: gives that of a row.

    Raises:
        UserError: the file cannot be read, or a row has none.
    """
    found: dict[str, None] = {}
    for number, row in read_json_lines(path, "--data_dir"):
        try:
            found[passage_of(row)] = None
        except (LookupError, TypeError, AttributeError):
            raise UserError(f"--data_dir {path}: line {number} has no passage") from None
    return list(found)


@torch.no_grad()
def last_states(model: PreTrainedModel, windows: Tensor, batch_size: int = 1) -> Tensor:
    """A model's states behind the final norm, [count, length, hidden] in fp32 on the CPU; all processes get all."""
    found = torch.zeros(*windows.shape, model.config.hidden_size)
    for place, ids, states in final_states(model, windows, batch_size, "dense model's states"):
        found[place : place + len(ids)] = states.cpu()
    sum_over_processes(found)
    return found


@torch.no_grad()
def agreement(
    model: PreTrainedModel,
    windows: Tensor,
    dense_states: Tensor,
    dense_logits: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """A model's next-token predictions beside the dense model's. Several processes share the windows.

    Args:
        windows: token ids [count, length].
        dense_states: see `last_states`.
        dense_logits: the dense model's head; None: it is the model's own, which pruning leaves as it is.

    Returns:
        kl: KL(dense || model) in nats, top1: the share of predictions whose first choice is the dense model's, both
        means over all places but the windows' last; and the perplexity of both models there.

    Raises:
        UserError: a perplexity is not finite.
    """
    decoder = decoder_of(model)
    compare = partial(_compared, decoder.logits, dense_logits or decoder.logits)
    totals = _totals(model, windows, dense_states, compare, 4, batch_size)
    tokens = len(windows) * (windows.shape[1] - 1)
    kl, top1, *losses = totals.tolist()
    names = {"dense": "the dense model", "pruned": "the pruned model"}
    perplexities = {
        name: exp_of_mean(model, loss, tokens, what) for (name, what), loss in zip(names.items(), losses, strict=True)
    }
    return {"kl": kl / tokens, "top1": top1 / tokens, "perplexity": perplexities}


@torch.no_grad()
def divergence(model: PreTrainedModel, windows: Tensor, dense_states: Tensor, batch_size: int = 1) -> float:
    """KL(dense || model) alone, as `agreement` has it; infinite where it is not finite.

    Args:
        windows: token ids [count, length]. dense_states: see `last_states`; of the same head.
    """
    logits_of = decoder_of(model).logits

    def losses(states: Tensor, dense: Tensor, _: Tensor) -> Tensor:
        return soft_label_losses(logits_of(states), logits_of(dense), temperature=1.0)[:, None]

    (total,) = _totals(model, windows, dense_states, losses, 1, batch_size)
    return (total / windows[:, 1:].numel()).item() if total.isfinite() else torch.inf


def _totals(
    model: PreTrainedModel,
    windows: Tensor,
    dense_states: Tensor,
    compare: Callable[[Tensor, Tensor, Tensor], Tensor],
    terms: int,
    batch_size: int,
) -> Tensor:
    """Sums over the predicted tokens of all processes' windows, [terms] in fp64.

    Args:
        compare: of tokens' states and dense states [tokens, hidden] and labels [tokens] gives terms [tokens, terms].
    """
    totals = torch.zeros(terms, dtype=torch.double)
    for place, ids, states in final_states(model, windows, batch_size, "agreement"):
        expected = dense_states[place : place + len(ids)].to(states)
        rows = (part[:, :-1].flatten(0, 1) for part in (states, expected))
        totals += in_blocks(compare, *rows, ids[:, 1:].flatten()).double().sum(0).cpu()
    sum_over_processes(totals)
    return totals


def _compared(
    logits_of: Callable[[Tensor], Tensor],
    dense_logits_of: Callable[[Tensor], Tensor],
    states: Tensor,
    dense_states: Tensor,
    labels: Tensor,
) -> Tensor:
    """Of each token divergence, agreement of first choices, the dense model's loss and the model's, [tokens, 4]."""
    logits, dense = logits_of(states).float(), dense_logits_of(dense_states).float()
    same = (logits.argmax(-1) == dense.argmax(-1)).float()
    losses = [F.cross_entropy(each, labels, reduction="none") for each in (dense, logits)]
    return torch.stack([soft_label_losses(logits, dense, temperature=1.0), same, *losses], dim=-1)
