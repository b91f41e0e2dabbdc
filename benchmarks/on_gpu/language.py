"""Language models on a GPU: a large one pruned, a small one recovered, adapters beside 4 bits."""

from pathlib import Path
from typing import Any

from large_model.random_model import random_text, save_random_model

from compression.assets import ensure_llm
from compression.checkpoint import load_language_model
from compression.files import read_json
from compression.llm.text import load_corpus, tokenize
from compression.sources import LLM_FOLDER
from compression.stage_record import read_stage
from on_gpu.setting import Figures, Setting

RATIO = 0.5
RECOVERY_LENGTH = 512
PASSES = ("before", "after")


# The shape of Llama-3-8B, in memory and streamed.


def large(setting: Setting, offload: str, keep: bool) -> Figures:
    """Prune a random model of the large shape by half; seconds and memory of each phase."""
    sizes, name = setting.sizes, f"large_{offload}"
    calibration = ["--num_samples", sizes.windows, "--repair_samples", 2 * sizes.windows, "--length", sizes.length]
    # Both runs start from one dense model, which the second of them removes.
    places = ["--results_dir", setting.work, "--output_name", "large", *(["--keep"] if keep else [])]
    flags = ["--shape", sizes.large, "--ratio", RATIO, "--offload", offload, *calibration, *places]
    setting.run("benchmarks/large_model.py", *flags)
    found = read_json(setting.work / "large.json")
    for end in ("json", "png"):
        (setting.work / f"large.{end}").rename(setting.work.parent / f"{name}.{end}")
    (run,) = found["runs"].values()
    return large_figures(run, found["formula"], offload)


def large_figures(run: dict[str, Any], formula: dict[str, int], offload: str) -> Figures:
    """The phases of one run as a flat list."""
    figures: Figures = {"weights, billions": formula["weights"] / 1e9}
    figures["by formula, peak on the device, GB"] = (
        formula["in_memory_bytes" if offload == "none" else "streamed_bytes"] / 1e9
    )
    rows = [*run["pruning"]["phases"], *(row | {"phase": "forward pass"} for row in run["forward"]["phases"])]
    for row in rows:
        figures[f"{row['phase']}, s"] = row["seconds"]
        for kind, title in (("device", "on the GPU"), ("anonymous", "of the process, files left out")):
            if row[f"peak_{kind}_bytes"]:
                figures[f"{row['phase']}, peak {title}, GB"] = row[f"peak_{kind}_bytes"] / 1e9
    peaks = [row["peak_device_bytes"] or 0 for row in run["pruning"]["phases"]]
    figures |= {"pruning, s": run["pruning"]["seconds"], "pruning, peak on the GPU, GB": max(peaks) / 1e9}
    if run["forward"]["cuda_peak_bytes"]:
        figures["forward pass, peak of CUDA's own allocations, GB"] = run["forward"]["cuda_peak_bytes"] / 1e9
    return figures


def large_in_memory(setting: Setting) -> Figures:
    """The whole model on the GPU."""
    return large(setting, "none", keep=True)


def large_streamed(setting: Setting) -> Figures:
    """One layer at a time on the GPU; does it choose as the run in memory did?"""
    figures = large(setting, "disk", keep=False)
    chosen = [layer_sizes(setting.work.parent / f"large_{offload}.json") for offload in ("none", "disk")]
    if all(chosen):
        figures["layers"] = len(chosen[0])
        figures["layers with the sizes that they have when pruned in memory"] = sum(
            one == other for one, other in zip(*chosen, strict=False)
        )
    return figures


def layer_sizes(path: Path) -> list[dict[str, int]]:
    """Sizes of the layers that a run of benchmarks/large_model.py left; none where it was not run."""
    if not path.is_file():
        return []
    (run,) = read_json(path)["runs"].values()
    return run["model"]["pruned"]["layers"]


# SmolLM2-135M: recovery at 50 %.


def small_model(setting: Setting) -> tuple[Path, list[object], str]:
    """The dense small model, the flags that name its texts, and the texts that perplexity is measured on."""
    if setting.rehearse:
        return rehearsed_model(setting)
    base = ensure_llm(setting.base_model, LLM_FOLDER)
    has_ptb = setting.data_dir is not None and (Path(setting.data_dir) / "ptb" / "ptb.test.txt").is_file()
    return (
        base,
        ["--data_dir", setting.data_dir] if setting.data_dir else [],
        "wikitext2,ptb" if has_ptb else "wikitext2",
    )


def rehearsed_model(setting: Setting) -> tuple[Path, list[object], str]:
    """A tiny random one, and random text that stands for WikiText-2."""
    folder, shape = setting.work / "small_dense", setting.sizes.decoder
    if not folder.is_dir():
        save_random_model(folder, shape, 10**9, 0, {"stage": "random_model"})
    texts = setting.work / "texts" / "wikitext2"
    texts.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(("train", "valid", "test")):
        (texts / f"wiki.{part}.raw").write_text(random_text(shape.vocabulary, 4000, seed), encoding="utf-8")
    return folder, ["--data_dir", texts.parent], "wikitext2"


def lengths(setting: Setting) -> list[object]:
    """Flags of windows that are shorter in a rehearsal."""
    length = setting.sizes.length
    return ["--eval_length", length, *(["--eval_samples", 2] if setting.rehearse else [])]


def pruned_small(setting: Setting, name: str = "small", *more_flags: object) -> Path:
    """The small model pruned by half, as run_global_pruning.py writes it; made unless it is there."""
    folder, sizes = setting.work / name, setting.sizes
    if not (folder / "run.json").is_file():
        base, texts, evaluated = small_model(setting)
        calibration = ["--num_samples", sizes.windows, "--repair_samples", 2 * sizes.windows]
        windows = ["--sequence_length", sizes.length, "--analysis_length", sizes.length // 2, *lengths(setting)]
        places = ["--base_model", base, "--results_dir", setting.work, "--output_name", folder.name]
        more = ["--run_evaluation", "ppl,efficiency", "--eval_ppl_datasets", evaluated, "--agreement_text", "none"]
        more += ["--efficiency_repeats", sizes.repeats]
        flags = [*places, "--pruning_ratio", RATIO, *calibration, *windows, *more, *texts, "--resume", *more_flags]
        setting.run("run_global_pruning.py", *flags)
    return folder


def train(setting: Setting, name: str, *flags: object) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Train the pruned model on, unless that is done; what `stage.json` says of metrics and data, and seconds."""
    folder, (_, texts, evaluated) = setting.work / name, small_model(setting)
    places = ["--pruned_model", pruned_small(setting) / "models", "--results_dir", setting.work, "--output_name", name]
    common = ["--eval_ppl_datasets", evaluated, "--max_length", min(RECOVERY_LENGTH, setting.sizes.length)]
    resumed = ["--resume", "--skip_existing"]
    seconds = setting.run("post_training.py", *places, *common, *lengths(setting), *texts, *resumed, *flags)
    stage = read_stage(folder) or {}
    return stage["metrics"], stage["data"], seconds


def perplexities(metrics: dict[str, Any], when: str, title: str) -> Figures:
    """Perplexities of one state of a model."""
    return {f"perplexity on {text}, {title}": value for text, value in metrics[when]["perplexity"].items()}


def recovery(setting: Setting) -> Figures:
    """Prune by half, then train all weights; speeds of the dense and the pruned model."""
    results = read_json(pruned_small(setting) / "evaluation" / "evaluation_results.json")
    window, wanted = min(RECOVERY_LENGTH, setting.sizes.length), setting.recovery_tokens
    there = min(wanted, text_tokens(setting))
    rows = max(1, there // window)
    epochs = max(1, round(wanted / (rows * window)))
    flags = ["--finetune_method", "full", "--finetune_samples", rows, "--num_epochs", epochs]
    flags += ["--batch_size", 16, "--learning_rate", 2e-4]
    metrics, data, seconds = train(setting, "small_recovered", *flags)
    figures = perplexities(results, "dense", "dense") | perplexities(results, "pruned", "pruned by 50 %")
    figures |= perplexities(metrics, "after", "recovered")
    figures |= {"tokens trained on": data["tokens"] * epochs, "passes over the text": epochs, "training, s": seconds}
    for model in ("dense", "pruned"):
        for phase in ("prefill", "decode"):
            speed = results["efficiency"][model][phase]["median_tokens_per_second"]
            figures[f"{phase}, {model}, tokens per second"] = speed
    return figures


def text_tokens(setting: Setting) -> int:
    """Tokens of WikiText-2's train part."""
    base, texts, _ = small_model(setting)
    _, tokenizer = load_language_model(base)
    return len(tokenize(tokenizer, load_corpus("wikitext2", "train", str(texts[1]) if texts else None)))


def qlora(setting: Setting) -> Figures:
    """Adapters beside frozen weights in 4 bits, and beside the same in bfloat16."""
    common = ["--finetune_samples", setting.sizes.adapter_windows, "--num_epochs", 1, "--learning_rate", 5e-4]
    figures: Figures = {}
    for name, title, flags in (
        ("small_lora", "bfloat16", ["--dtype", "bfloat16"]),
        ("small_qlora", "4 bits", ["--load_in_4bit"]),
    ):
        metrics, _, seconds = train(setting, name, *common, *flags)
        for when in PASSES:
            figures |= perplexities(metrics, when, f"{when} LoRA on {title}")
        figures[f"LoRA on {title}, s"] = seconds
    return figures
