"""The classifier track on a GPU: stages 8, 9 and 10, exact against the CPU, and 4 bits timed against bfloat16."""

import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from compression.checkpoint import load_classifier, save_checkpoint
from compression.formats import FourBit
from compression.inputs import find_newest
from compression.quantization import encoder_linears
from compression.runtime import seed_everything
from compression.stage_record import describe_stage, read_stage
from compression.timing import measure_latency
from on_gpu.setting import Figures, Setting

GOOD, BAD = ("fine", "warm", "bright", "moving"), ("dull", "cold", "flat", "tired")
OTHER = tuple("the a film plot scene cast is was and but very quite rather of in with".split())


def model_folders(setting: Setting) -> tuple[Path, Path, str]:
    """Teacher, student and sentences: those that the user names, else random models and made-up sentences."""
    if setting.teacher and setting.student and setting.sentiment_dir:
        return setting.teacher, setting.student, setting.sentiment_dir
    folder = setting.work / "classifier"
    if not (folder / "dev.tsv").is_file():
        write_sentences(folder, setting.sizes.sentences)
        save_random_models(folder, setting)
    return folder / "teacher_model", folder / "student_model", str(folder)


def write_sentences(folder: Path, count: int) -> None:
    """Sentences whose label is that of most of their words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, number in (("train.tsv", count), ("dev.tsv", max(16, count // 8))):
        rows = ["sentence\tlabel"]
        for index in range(number):
            label = index % 2
            words = draw.choices(OTHER, k=draw.randrange(4, 12)) + draw.choices((BAD, GOOD)[label], k=2)
            words += draw.choices((GOOD, BAD)[label], k=1)
            rows.append(f"{' '.join(draw.sample(words, len(words)))}\t{label}")
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def save_random_models(folder: Path, setting: Setting) -> None:
    """A teacher and a student with random weights, of the sizes of BERT-base and DistilBERT-base."""
    sizes, words = setting.sizes, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *OTHER, *GOOD, *BAD]
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    seed_everything(0)
    common = dict(vocab_size=sizes.vocabulary, num_labels=2, max_position_embeddings=512)
    bert = BertConfig(
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.neurons,
        num_hidden_layers=sizes.teacher_layers,
        **common,
    )
    distilbert = DistilBertConfig(
        dim=sizes.hidden, n_heads=sizes.heads, hidden_dim=sizes.neurons, n_layers=sizes.student_layers, **common
    )
    models = {
        "teacher": BertForSequenceClassification(bert),
        "student": DistilBertForSequenceClassification(distilbert),
    }
    for name, model in models.items():
        stage = describe_stage(name, {}, {}, {}, {"name": "made-up sentences"})
        save_checkpoint(folder / f"{name}_model", model.eval(), tokenizer, stage)


def flags_of(setting: Setting) -> list[object]:
    """What stages 8 and 10 are given alike."""
    teacher, _, data = model_folders(setting)
    sizes = setting.sizes
    places = ["--models_dir", setting.work, "--teacher_path", teacher, "--data_dir", data]
    return [*places, "--max_length", sizes.sentence_length, "--batch_size", sizes.batch_size, "--amp", "auto"]


def pruned_classifier(setting: Setting) -> Path:
    """The model that stage 8 makes, made unless it is there."""
    if (found := find_newest(setting.work, "pruned")) is None:
        _, student, _ = model_folders(setting)
        epochs = ["--num_epochs", 3, "--pruning_start_epoch", 1, "--pruning_end_epoch", 2]
        setting.run("8_pruning_with_finetuning.py", *flags_of(setting), "--student_path", student, *epochs)
        found = find_newest(setting.work, "pruned")
    assert found is not None, "stage 8 left no model"
    return found


@torch.inference_mode()
def logits(model: PreTrainedModel, setting: Setting) -> Tensor:
    """Of random sentences, on the CPU in fp32."""
    shape = (setting.sizes.batch_size, setting.sizes.sentence_length)
    ids = torch.randint(5, 29, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()


def difference(folder: Path, setting: Setting) -> float:
    """The largest difference between a model's logits on the CPU and on the device."""
    here, there = (logits(load_classifier(folder, device)[0], setting) for device in ("cpu", setting.device))
    return (here - there).abs().max().item()


def latencies(models: dict[str, PreTrainedModel], setting: Setting) -> Figures:
    """Latency at batch 1 and throughput at 32 of models, interleaved."""
    sizes, found = setting.sizes, {}
    times = measure_latency(models, setting.device, sizes.sentence_length, sizes.repeats, sizes.repeats)
    for name, figures in times.items():
        found[f"{name}, latency at batch 1, ms"] = figures["latency"]["median_ms"]
        found[f"{name}, sentences per second at batch 32"] = figures["throughput"]["median_samples_per_second"]
    return found


def stage_8(setting: Setting) -> Figures:
    """Prune while distilling on the device; the result on the CPU and on the device; speed against the student."""
    _, student, _ = model_folders(setting)
    folder = pruned_classifier(setting)
    metrics = (read_stage(folder) or {})["metrics"]
    found: Figures = {
        "accuracy before pruning": metrics["accuracy_before"],
        "accuracy after": metrics["accuracy"],
        "masked against smaller model, largest difference of logits": metrics["logit_difference"],
        "CPU against device, float32, largest difference of logits": difference(folder, setting),
    }
    models = {}
    for name, path in (("student", student), ("pruned", folder)):
        for dtype in (torch.float32, torch.bfloat16):
            models[f"{name}, {str(dtype)[6:]}"] = load_classifier(path, setting.device)[0].to(dtype)
    return found | latencies(models, setting)


def quantized(setting: Setting, name: str, *flags: object, on_cpu: bool = False) -> Path:
    """What stage 9 makes of the pruned model."""
    output, pruned = setting.work / f"quantized_{name}", pruned_classifier(setting)
    places = ["--pruned_model_path", pruned, "--models_dir", setting.work, "--output_dir", output]
    setting.run("9_quantize_pruned_model.py", *places, "--skip_existing", *flags, on_cpu=on_cpu)
    return output


def differing_values(first: Path, second: Path) -> tuple[int, int]:
    """How many stored values of two checkpoints differ, and how many there are."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys(), "the checkpoints hold other tensors"
    return sum(int((one[name] != other[name]).sum()) for name in one), sum(tensor.numel() for tensor in one.values())


def stage_9(setting: Setting) -> Figures:
    """Quantize on the CPU and on the device: the same bytes, the same logits? Is it faster than bfloat16?"""
    here = quantized(setting, "on_the_cpu", "--compute_dtype", "float32", on_cpu=True)
    there = quantized(setting, "on_the_device", "--compute_dtype", "float32")
    half = quantized(setting, "bfloat16", "--compute_dtype", "bfloat16")
    differing, count = differing_values(here, there)
    found: Figures = {
        "stored values that differ between CPU and device": differing,
        "stored values": count,
        "CPU against device, 4 bits, float32, largest difference of logits": difference(there, setting),
    }
    models = {"pruned, bfloat16": load_classifier(pruned_classifier(setting), setting.device)[0].bfloat16()}
    models["pruned, 4 bits, computed in bfloat16"] = load_classifier(half, setting.device)[0]
    models["pruned, 8 bits"] = load_classifier(quantized(setting, "8_bits", "--load_in_8bit"), setting.device)[0]
    return found | latencies(models, setting)


def stage_10(setting: Setting) -> Figures:
    """Train in 4 bits on the device; are the values that it trains with those of the CPU, bit for bit?"""
    pruned = pruned_classifier(setting)
    if (folder := find_newest(setting.work, "pruned_qkd4bit")) is None:
        more = ["--pruned_model_path", pruned, "--num_epochs", 1, "--compute_dtype", "bfloat16"]
        setting.run("10_qat_kd_4bit.py", *flags_of(setting), *more)
        folder = find_newest(setting.work, "pruned_qkd4bit")
    assert folder is not None, "stage 10 left no model"
    metrics = (read_stage(folder) or {})["metrics"]
    model = load_classifier(pruned)[0]
    weights = [linear.weight.detach() for linear in encoder_linears(model).values()]
    same = [torch.equal(FourBit().values(w), FourBit().values(w.to(setting.device)).cpu()) for w in weights]
    found: Figures = {
        "matrices with the same 4-bit values on CPU and device": sum(same),
        "matrices": len(same),
        "accuracy in float32": metrics["accuracy_fp32"],
        "accuracy in 4 bits before training": metrics["accuracy_ptq"],
        "accuracy in 4 bits after": metrics["accuracy"],
        "trained against packed model, largest difference of logits": metrics["logit_difference"],
    }
    models = {"pruned, bfloat16": model.to(setting.device, torch.bfloat16)}
    models["trained in 4 bits, computed in bfloat16"] = load_classifier(folder, setting.device)[0]
    return found | latencies(models, setting)
