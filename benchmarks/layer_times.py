"""Measure how long attentions and MLPs of a language model take here at each size, for pruning to a time elsewhere.

    python benchmarks/layer_times.py [--base_model DIR] [--hardware_batch 1] [--hardware_length 1024]

Prefill and decode, in transformers. Writes results/layer_times.json, which run_global_pruning.py takes on any machine:
--target decode 0.7 --hardware layer_times.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.config import AtLeast, Config, run_script
from compression.decoder import decoder_of
from compression.files import write_json
from compression.llm.speed import PHASES, measure_table
from compression.runtime import RESULTS, Dtype, log, pick_device, pick_dtype
from compression.sources import LLM, LLM_FOLDER


@dataclass
class LayerTimesConfig(Config):
    base_model: str = LLM
    """Model to measure: a folder, or a name on the hub."""
    device_map: str = "auto"
    """The device: auto (a GPU where there is one, else the CPU), cpu or cuda:N."""
    dtype: Dtype = "auto"
    """Of the weights; auto: bfloat16 where the hardware multiplies it, else float32."""
    hardware_batch: Annotated[int, AtLeast(1)] = 1
    """Texts at once."""
    hardware_length: Annotated[int, AtLeast(1)] = 1024
    """Tokens of the prompt."""

    presets: ClassVar = {"fast": dict(hardware_length=128)}


def main(config: LayerTimesConfig) -> None:
    device, dtype = pick_device(config.device_map), pick_dtype(config.dtype, "Weights")
    model, _ = load_language_model(ensure_llm(config.base_model, LLM_FOLDER), device, dtype)
    decoder_of(model)  # refuses an unsupported architecture
    table = measure_table(model, config.hardware_batch, config.hardware_length)
    write_json(RESULTS / "layer_times.json", table.as_dict())
    for phase in PHASES:
        layers, rest = table.layers_time(model, phase), table.rest[phase]
        log.info("%s: %.2f ms of all layers, %.2f ms of the rest", phase, layers, rest)


if __name__ == "__main__":
    run_script(LayerTimesConfig, main)
