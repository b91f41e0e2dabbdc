"""Merge a LoRA adapter into the model it was trained on.

    python merge_and_save_lora.py --pruned_model results/NAME/models --lora_dir results/NAME_lora --output_dir DIR

Writes an ordinary checkpoint of the model's own class. Model with adapter and merged model must give the same logits,
else nothing is written.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path

import torch

from compression.checkpoint import load_language_model, save_checkpoint
from compression.config import Config, Flat, group, run_script
from compression.hub import Publishing
from compression.inputs import require_language_model
from compression.llm.lora import load_adapter, require_adapter
from compression.outputs import Output, owned
from compression.runtime import RESULTS, UserError, log, pick_device, shown
from compression.stage_record import describe_stage, identify, is_made_from, read_stage

# The merged weights as they are written, rounded to float32, against W x + B A x. Both run in float64: two orders of
# summation in float32 alone come near to this.
LOGIT_TOLERANCE = 1e-4
TOKENS = 32


@dataclass
class MergeConfig(Config):
    pruned_model: Path = RESULTS / "hgsp" / "models"
    """The model that the adapter was trained on."""
    lora_dir: Path = RESULTS / "recovered"
    """The adapter."""
    output_dir: Path = RESULTS / "recovered_merged"
    """Where the merged model goes; its weights are float32."""
    overwrite: bool = False
    """Replace an earlier result that was merged from another model or adapter."""
    seed: int = 0
    """Fixes the tokens that the two models are compared on."""
    publishing: Flat[Publishing] = group(Publishing)


def main(config: MergeConfig) -> None:
    require_language_model(config.pruned_model, "--pruned_model")
    require_adapter(config.lora_dir, "--lora_dir")
    output = Output(config.output_dir, "--output_dir", "merged")
    output.check([config.pruned_model, config.lora_dir])
    inputs = {"parent": identify(config.pruned_model), "adapter": identify(config.lora_dir)}
    output.check_same(is_made_from(config.output_dir, {}, inputs), config.overwrite)
    with owned(config.output_dir):
        merge(config, inputs)
    config.publishing.publish(config.output_dir)


@torch.inference_mode()
def merge(config: MergeConfig, inputs: dict[str, dict[str, str]]) -> None:
    """Merge, compare, save."""
    model, tokenizer = load_language_model(config.pruned_model, pick_device(), torch.float64)
    adapted = load_adapter(model, config.lora_dir, "--lora_dir")
    if ((read_stage(config.lora_dir) or {}).get("config") or {}).get("load_in_4bit"):
        log.info(
            "The adapter was trained on 4-bit weights and goes into those of %s: measure again", config.pruned_model
        )

    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator).to(model.device)
    expected = model(ids).logits
    merged = adapted.merge_and_unload().float()
    difference = (merged.double()(ids).logits - expected).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:
        raise UserError(
            f"--lora_dir {config.lora_dir}: merged and adapted model differ by {difference:.1e} in logits, allowed is "
            f"{LOGIT_TOLERANCE:.0e}; nothing was saved; train the adapter again"
        )
    log.info("Adapted and merged model agree to %.1e in logits", difference)

    stage = describe_stage("merged", config.as_dict(), inputs, {"logit_difference": difference}, {})
    save_checkpoint(config.output_dir, merged.float(), tokenizer, stage)
    log.info("-> %s", shown(config.output_dir))


if __name__ == "__main__":
    run_script(MergeConfig, main)
