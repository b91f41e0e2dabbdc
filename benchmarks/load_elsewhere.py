"""Load the newest pruned checkpoint outside the project and compare its logits with those computed inside.

    python benchmarks/load_elsewhere.py [--checkpoint DIR] [--data_dir DIR]

The second process starts in an empty folder and knows only transformers: `trust_remote_code=True` and nothing of this
project. Writes results/load_elsewhere.json.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from compression.checkpoint import find_newest, load_classifier, read_stage, write_json
from compression.config import StageConfig, run_script
from compression.data import load_sentiment
from compression.runtime import MODELS, RESULTS, UserError, log

PROGRAM = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, sentences = sys.argv[1], json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
assert "compression" not in sys.modules
print(json.dumps(logits.tolist()))
"""


@dataclass
class LoadConfig(StageConfig):
    checkpoint: Path | None = None
    """A pruned checkpoint; by default the newest one under models/."""
    data_dir: str | None = None
    """Folder with SST-2, as for the stages."""
    sentences: int = 64
    """How many validation sentences are compared."""


def main(config: LoadConfig) -> None:
    folder = config.checkpoint or find_newest(MODELS, "pruned")
    if folder is None:
        raise UserError(
            "--checkpoint: no pruned model under models/; make one with: python 8_pruning_with_finetuning.py"
        )
    sentences = load_sentiment(config.data_dir).validation.sentences[: config.sentences]
    model, tokenizer = load_classifier(folder)
    with torch.no_grad():
        inside = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(Path(folder).resolve())], input=json.dumps(sentences), cwd=elsewhere,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    outside = torch.tensor(json.loads(result.stdout.splitlines()[-1]))
    figures = {
        "checkpoint": str(folder),
        "sentences": len(sentences),
        "inside_against_outside": (inside - outside).abs().max().item(),
        "masked_against_smaller": read_stage(folder)["metrics"]["logit_difference"],
    }
    write_json(RESULTS / "load_elsewhere.json", figures)
    log.info("%s", json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_script(LoadConfig, main)
