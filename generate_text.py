"""Text that a language model writes by itself, to calibrate or train on where no other text is like its own.

    python generate_text.py [--base_model models/llm-local] [--output_name own_text] [--tokens 131072] [--fast]
    python run_global_pruning.py --base_model models/llm-local --dataset results/own_text/text.txt

Documents are drawn token by token from the model's own predictions, each from the token that its texts begin with: of
all that the model has learned, in about the proportions in which it has (Williams et al. 2025, arXiv:2410.17170; Liu et
al. 2024, arXiv:2305.17888). Writes results/NAME: text.txt, and run.json with what made it.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compression.assets import ensure_llm
from compression.checkpoint import check_positions, load_language_model
from compression.config import NO_EFFECT, AtLeast, Between, Config, FolderName, run_script
from compression.files import write_text
from compression.integrity import RUN_FILE, digest_of, seal
from compression.outputs import OWN_TEXT, STATES_END, Output, owned
from compression.progress import progress
from compression.runtime import (
    MODELS,
    RESULTS,
    Dtype,
    UserError,
    device_named,
    fingerprint,
    log,
    own_share,
    pick_device,
    pick_dtype,
    processes,
    seed_step,
    shown,
)
from compression.saved_parts import SavedParts
from compression.sources import LLM, LLM_FOLDER
from compression.stage_record import contents, identify, is_made_from

TEXT_FILE = "text.txt"


@dataclass
class OwnTextConfig(Config):
    base_model: Annotated[str, NO_EFFECT] = LLM
    """Model that writes: a folder, or a name on the hub."""
    output_name: Annotated[str, FolderName(), NO_EFFECT] = "own_text"
    """Name of the folder in results_dir that the text goes to."""
    results_dir: Annotated[Path, NO_EFFECT] = RESULTS
    """Folder of all results."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that a fetched model goes to."""
    tokens: Annotated[int, AtLeast(1)] = 131072
    """Tokens in all, at least; the last documents make it full."""
    length: Annotated[int, AtLeast(1)] = 256
    """Tokens of a document."""
    temperature: Annotated[float, Between(0.01, 100)] = 1.0
    """1 draws from the model's own predictions, less from its likelier ones."""
    batch_size: Annotated[int, AtLeast(1)] = 64
    """Documents that are written at a time; they depend on it."""
    device_map: str = "auto"
    """The device the model is on: auto (a GPU where there is one, else the CPU), cpu or cuda:N."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    resume: Annotated[bool, NO_EFFECT] = False
    """Go on behind the documents that a killed run with the same settings had finished."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier text that was made with other settings or by another model."""
    seed: int = 42
    """Fixes what is drawn."""

    presets: ClassVar = {"fast": dict(tokens=16384, length=128)}

    def check(self) -> None:
        if self.device_map != "auto":
            device_named(self.device_map)

    @property
    def folder(self) -> Path:
        """Where the text goes."""
        return self.results_dir / self.output_name


def main(config: OwnTextConfig) -> None:
    base = ensure_llm(config.base_model, config.models_dir / LLM_FOLDER.name)
    inputs = {"parent": identify(base)}
    output = Output(config.folder, "--output_name", OWN_TEXT, RUN_FILE)
    output.check([base], shared=[config.results_dir, config.models_dir])
    output.check_same(is_made_from(config.folder, config.result_fields(), inputs, RUN_FILE), config.overwrite)
    key = digest_of([config.result_fields(), contents(inputs)], 12)
    states = config.folder.with_name(f".{config.output_name}_{key}{STATES_END}")
    with owned(config.folder, states):
        saved = SavedParts(states, config.resume)
        documents = write_documents(config, base, saved)
        if processes().is_main_process:
            with output.written() as folder:
                write_text(folder / TEXT_FILE, "\n\n".join(documents) + "\n")
                record = {"stage": OWN_TEXT, "config": config.as_dict(), "inputs": inputs, "documents": len(documents)}
                seal(folder, record | {"environment": fingerprint()}, RUN_FILE)
        saved.remove()
    log.info("%d documents of %d tokens -> %s", len(documents), config.length, shown(config.folder / TEXT_FILE))


def write_documents(config: OwnTextConfig, base: Path, saved: SavedParts) -> list[str]:
    """As many documents as have the tokens that are asked for, batch by batch; of several processes each draws one of
    as many batches."""
    model, tokenizer = load_language_model(base, pick_device(config.device_map), pick_dtype(config.dtype, "Weights"))
    check_positions(model, "length", config.length + 1)
    first = first_token(tokenizer, base)
    batches = range(-(-config.tokens // (config.length * config.batch_size)))
    drawn: dict[int, list[str]] = {}

    def draw(batch: int) -> dict[str, Any]:
        if batch not in drawn:
            mine = own_share(batches[batch : batch + processes().num_processes])
            texts = [(each, tokenizer.batch_decode(draw_batch(model, first, config, each))) for each in mine]
            drawn.update(gather_object(texts))
        return {"documents": drawn.pop(batch)}

    documents: list[str] = []
    for batch in progress(batches, "batches of documents"):
        documents += saved.json(f"batch_{batch}", partial(draw, batch))["documents"]
    # No text file has a zero byte in it.
    return [text.replace("\0", "") for text in documents[: -(-config.tokens // config.length)]]


def first_token(tokenizer: PreTrainedTokenizerBase, base: Path) -> int:
    """The token that texts begin with, else the one that ends them: between two texts it does both.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"--base_model {base}: its tokenizer names no token that begins or ends a text; name one in "
        f"{base}/tokenizer_config.json: bos_token"
    )


@torch.inference_mode()
def draw_batch(model: PreTrainedModel, first: int, config: OwnTextConfig, batch: int) -> Tensor:
    """Token ids [documents, length]. An end of text among them does not end one: what follows it is text too."""
    seed_step(config.seed, batch)
    begin = torch.full((config.batch_size, 1), first, device=model.device)
    # In the model's place, for whatever is not set here would be taken from there.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=config.temperature, top_k=0, max_new_tokens=config.length, pad_token_id=first
    )
    generate: Any = model.generate
    return generate(begin, attention_mask=torch.ones_like(begin))[:, 1:]


if __name__ == "__main__":
    run_script(OwnTextConfig, main)
