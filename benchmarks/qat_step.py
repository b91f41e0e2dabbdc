"""What 4-bit quantization-aware training adds to a training step.

    python benchmarks/qat_step.py [--model_path DIR]

Times optimizer steps of a plain fp32 model and of the same model with fake quantization, without and with double
quantization, and with bitsandbytes quantizing instead of the whole-tensor version; interleaved in one process, with
cross-entropy as the only loss. Writes results/qat_step.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from compression.checkpoint import load_classifier
from compression.config import Config, run_script
from compression.fake_quantization import add_fake_quantization
from compression.files import write_json
from compression.flops import count_parameters
from compression.formats import FourBit
from compression.inputs import find_newest
from compression.quantization import Format
from compression.runtime import MODELS, RESULTS, UserError, fingerprint, log, pick_device
from compression.timing import interleaved_times


@dataclass
class StepConfig(Config):
    model_path: Path | None = None
    """The model to time; by default the newest pruned one, else the student."""
    batch_size: int = 16
    """Sentences per step."""
    sequence_length: int = 16
    """Tokens per sentence; SST-2's training sentences have 13 on average."""
    rounds: int = 40
    """Timed steps of each kind."""
    seed: int = 0
    """Fixes the token ids."""

    presets: ClassVar = {"fast": dict(rounds=10)}


class ByBitsandbytes(FourBit):
    """The same values, made by bitsandbytes."""

    def values(self, weight: torch.Tensor) -> torch.Tensor:
        codes, state = quantize_4bit(weight.reshape(1, -1), blocksize=self.blocksize, quant_type=self.quant_type)
        return dequantize_4bit(codes, state).view_as(weight)


class Trainer:
    """A plain training loop's step on a model of its own."""

    def __init__(self, folder: Path, device: torch.device, storage: Format | None):
        self.model = load_classifier(folder, device)[0].train()
        self.layers = add_fake_quantization(self.model, storage).values() if storage else ()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimizer step."""
        self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer in self.layers:
            layer.refresh()


def main(config: StepConfig) -> None:
    folder = config.model_path or find_newest(MODELS, "pruned") or find_newest(MODELS, "student")
    if folder is None:
        raise UserError("--model_path: no student under models/; make one with: python 2_distill_student.py")
    device = pick_device()
    trainers = {
        "plain": Trainer(folder, device, None),
        "nf4": Trainer(folder, device, Format()),
        "nf4_double_quant": Trainer(folder, device, Format(FourBit(double_quant=True))),
        "nf4_by_bitsandbytes": Trainer(folder, device, Format(ByBitsandbytes())),
    }
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.sequence_length)
    ids = torch.randint(trainers["plain"].model.config.vocab_size, shape, generator=generator).to(device)
    labels = torch.randint(2, shape[:1], generator=generator).to(device)
    steps = {name: lambda trainer=trainer: trainer.step(ids, labels) for name, trainer in trainers.items()}
    seconds = interleaved_times(steps, config.rounds, device)
    figures = {
        name: {"median_ms": 1e3 * median(times), "ratio_to_plain": median(times) / median(seconds["plain"])}
        for name, times in seconds.items()
    }
    log.info("%s", "\n".join(f"{name}: {values}" for name, values in figures.items()))
    about = {"model": str(folder), "parameters": count_parameters(trainers["plain"].model)}
    write_json(
        RESULTS / "qat_step.json", about | {"steps": figures, "config": config.as_dict(), "environment": fingerprint()}
    )


if __name__ == "__main__":
    run_script(StepConfig, main)
