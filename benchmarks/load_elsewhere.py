"""Load a pruned checkpoint outside the project and compare what it computes with what it computes inside.

    python benchmarks/load_elsewhere.py [--checkpoint DIR] [--data_dir DIR]

A classifier is compared in its logits on validation sentences, a language model in its logits and its perplexity on
windows of WikiText-2's test part. The second process starts in an empty folder and knows only transformers:
`trust_remote_code=True` and nothing of this project; a language model of a stock class gets not even that. Writes
results/load_elsewhere.json.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from compression.checkpoint import load_classifier, load_language_model
from compression.classifier.data import DatasetSettings, load_data
from compression.config import Config, run_script
from compression.files import read_json, write_json
from compression.inputs import find_newest
from compression.llm.perplexity import token_losses
from compression.llm.text import load_corpus, tokenize, windows
from compression.runtime import MODELS, RESULTS, UserError, log
from compression.stage_record import read_stage

CLASSIFIER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, sentences = sys.argv[1], json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # or it asks, for the sake of the config
with torch.no_grad():
    logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
assert "compression" not in sys.modules
print(json.dumps(logits.tolist()))
"""
LANGUAGE_MODEL = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.load(sys.stdin))
trust = "auto_map" in json.load(open(folder + "/config.json"))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
with torch.no_grad():
    logits = torch.cat([model(row[None]).logits for row in ids])
losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
assert "compression" not in sys.modules
print(json.dumps([type(model).__name__, losses.double().mean().exp().item(), logits[:, -1].tolist()]))
"""


@dataclass
class LoadConfig(Config):
    checkpoint: Path | None = None
    """A pruned checkpoint, classifier or language model; by default the newest classifier under models/."""
    data_dir: str | None = None
    """Folder with SST-2 or wikitext2/, as for the stages."""
    sentences: int = 64
    """How many validation sentences are compared."""
    samples: int = 8
    """How many windows of 512 tokens are compared with a language model."""


def outside(program: str, folder: Path, given: Any) -> Any:
    """What a process outside the project prints as JSON, given JSON."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", program, str(Path(folder).resolve())]
        result = subprocess.run(
            command, input=json.dumps(given), cwd=elsewhere, capture_output=True, text=True, check=True
        )
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def compare_classifier(folder: Path, config: LoadConfig) -> dict[str, Any]:
    sentences = load_data(DatasetSettings(data_dir=config.data_dir)).validation.sentences[: config.sentences]
    model, tokenizer = load_classifier(folder)
    inside = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    return {
        "sentences": len(sentences),
        "inside_against_outside": (inside - torch.tensor(outside(CLASSIFIER, folder, sentences))).abs().max().item(),
        "masked_against_smaller": read_stage(folder)["metrics"]["logit_difference"],
    }


@torch.no_grad()
def compare_language_model(folder: Path, config: LoadConfig) -> dict[str, Any]:
    model, tokenizer = load_language_model(folder)
    ids = windows(tokenize(tokenizer, load_corpus("wikitext2", "test", config.data_dir)), 512)[: config.samples]
    logits = torch.cat([model(row[None]).logits for row in ids])
    losses = token_losses(torch.nn.Identity(), logits, ids)
    name, perplexity, last = outside(LANGUAGE_MODEL, folder, ids.tolist())
    return {
        "windows": list(ids.shape),
        "class_outside": name,
        "perplexity_inside": losses.double().mean().exp().item(),
        "perplexity_outside": perplexity,
        "inside_against_outside": (logits[:, -1] - torch.tensor(last)).abs().max().item(),
    }


def main(config: LoadConfig) -> None:
    folder = config.checkpoint or find_newest(MODELS, "pruned")
    if folder is None:
        raise UserError(
            "--checkpoint: no pruned model under models/; make one with: python 8_pruning_with_finetuning.py"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"--checkpoint {folder}: no checkpoint there (no config.json); name the folder of a model")
    language = read_json(folder / "config.json")["architectures"][0].endswith("ForCausalLM")
    compare = compare_language_model if language else compare_classifier
    figures = {"checkpoint": str(folder)} | compare(folder, config)
    write_json(RESULTS / "load_elsewhere.json", figures)
    log.info("%s", json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_script(LoadConfig, main)
