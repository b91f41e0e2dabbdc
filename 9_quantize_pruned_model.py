"""Stage 9: quantize a model after training (NF4, or 8 bits).

    python 9_quantize_pruned_model.py [--double_quant] [--embedding_bits 8] [--load_in_8bit]
    python 9_quantize_pruned_model.py --pruned_model_path models/student_model \\
        --output_dir models/student_quantized_model
    python 9_quantize_pruned_model.py --pruned_model_path results/NAME/models --output_dir results/NAME_nf4

Reads the newest pruned classifier, or the model that --pruned_model_path names: a classifier or a language model,
pruned or not. Writes models/pruned_quantized_final, a language model to --output_dir. No data is needed. The head stays
as it is; so do a language model's embeddings and norms.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from compression.checkpoint import load_classifier, load_language_model, save_checkpoint
from compression.config import NO_EFFECT, Config, Flat, group, run_script
from compression.hub import Publishing
from compression.inputs import find_unquantized, is_language_model
from compression.outputs import Output, owned
from compression.quantization import DEFAULT_EMBEDDING_BITS, Storage, bytes_by_part, pack, pack_linears
from compression.runtime import MODELS, UserError, log, pick_device, pick_dtype, shown
from compression.stage_record import describe_stage, identify, is_done, read_stage
from compression.surgery import to_pruned
from compression.tables import Column, text_table


@dataclass
class QuantizationConfig(Config):
    pruned_model_path: Annotated[Path | None, NO_EFFECT] = None
    """The model to quantize; by default the newest pruned classifier in models_dir."""
    models_dir: Annotated[Path, NO_EFFECT] = MODELS
    """Folder that checkpoints are read from and written to."""
    output_dir: Annotated[Path | None, NO_EFFECT] = None
    """Where to write; by default pruned_quantized_final in models_dir, for a language model there is no default."""
    load_in_8bit: bool = False
    """8-bit weights (LLM.int8) instead of 4-bit ones."""
    overwrite: Annotated[bool, NO_EFFECT] = False
    """Replace an earlier result that was made with other settings or from another model."""
    skip_existing: Annotated[bool, NO_EFFECT] = False
    """Do nothing if the output exists and was made with this configuration from this model."""
    storage: Flat[Storage] = group(
        Storage, quant_type="nf4", blocksize=64, double_quant=False, embedding_bits=None, compute_dtype="auto"
    )
    publishing: Flat[Publishing] = group(Publishing)

    # Quantization takes seconds: the quick settings are the usual ones.
    presets: ClassVar = {"fast": {}}

    def check(self) -> None:
        for name in ("double_quant", "quant_type", "blocksize"):
            value = getattr(self.storage, name)
            if self.load_in_8bit and value != getattr(Storage(), name):
                raise UserError(f"--{name} {value}: is for 4-bit weights; not allowed with --load_in_8bit")


def with_embedding_bits(config: QuantizationConfig, folder: Path) -> QuantizationConfig:
    """The settings with those bits that a classifier has by default; a language model has none."""
    bits = config.storage.embedding_bits
    if not is_language_model(folder):
        return config.updated(embedding_bits=bits or DEFAULT_EMBEDDING_BITS)
    if bits is not None:
        raise UserError(
            f"--embedding_bits {bits}: is for classifiers, and the embeddings of a language model ({folder}) stay as "
            "they are; leave it out"
        )
    return config


def output_path(config: QuantizationConfig, folder: Path) -> Path:
    """Where the result goes."""
    if config.output_dir is None and is_language_model(folder):
        raise UserError(f"--output_dir: has no default for a language model ({folder}); name a folder of its own")
    return config.output_dir or config.models_dir / "pruned_quantized_final"


def log_sizes(bytes_before: dict[str, int], bytes_after: dict[str, int]) -> None:
    """Sizes by part, in 10^6 bytes, against the model as it was loaded."""
    columns = [
        Column("MB", str),
        Column("before", lambda part: bytes_before[part] / 1e6, "{:.2f}"),
        Column("after", lambda part: bytes_after[part] / 1e6, "{:.2f}"),
        Column("ratio", lambda part: bytes_after[part] / bytes_before[part], "{:.3f}"),
    ]
    log.info("%s", text_table(columns, ["embeddings", "encoder", "head", "total"]))


def stage_name(folder: Path) -> str:
    """What `stage.json` of the result says: the model's own stage with `_quantized` behind it."""
    parent = (read_stage(folder) or {}).get("stage")
    return f"{parent}_quantized" if parent else "quantized"


def main(config: QuantizationConfig) -> None:
    folder = find_unquantized(config.pruned_model_path, config.models_dir)
    config, path = with_embedding_bits(config, folder), output_path(config, folder)
    output = Output(path, "--output_dir", stage_name(folder))
    inputs = {"parent": identify(folder)}
    if is_done(output, config, inputs, reads=[folder], shared=[config.models_dir]):
        config.publishing.publish(path)
        return
    with owned(path):
        quantize(config, folder, output, inputs)
    config.publishing.publish(path)


def quantize(config: QuantizationConfig, folder: Path, output: Output, inputs: dict[str, Any]) -> None:
    """Load, pack, save."""
    storage = config.storage.format(bits=8 if config.load_in_8bit else 4)
    compute_dtype = pick_dtype(config.storage.compute_dtype, "Compute dtype")
    if is_language_model(folder):
        model, tokenizer = load_language_model(folder, "cpu", dtype=None)
        before = bytes_by_part(model)
        # The dense form is let go of here, so that each of its layers goes when its packed form is there.
        model = to_pruned(model)
        pack_linears(model, storage.linears, compute_dtype)
    else:
        model, tokenizer = load_classifier(folder, pick_device())
        before = bytes_by_part(model)
        model = pack(model, storage, compute_dtype)

    sizes = {"bytes_before": before, "bytes_after": bytes_by_part(model)}
    trained_on = (read_stage(folder) or {}).get("data")
    stage = describe_stage(output.kind, config.as_dict(), inputs, sizes, trained_on)
    save_checkpoint(output.path, model, tokenizer, stage)
    log_sizes(**sizes)
    log.info("%s -> %s", shown(folder), shown(output.path))


if __name__ == "__main__":
    run_script(QuantizationConfig, main)
