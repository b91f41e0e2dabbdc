"""The tiny world that is attacked: a copy of the code, and a folder that each case gets a copy of.

code/                   the project's scripts and package, which are run
template/clone/         stands for the repository: models/, results/, a .git and files of the user
template/home/, other/  the user's home folder, models and files outside of the repository
template/data/          sentences, a text, instructions
"""

import os
import random
import shutil
from pathlib import Path

from faults.process import World

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
USER_FILE = "thesis.txt"

TEXT = "../data/text.txt"
EVALUATE = f"--eval_ppl_datasets {TEXT} --eval_length 16 --eval_samples 2"
PRUNE = (
    f"--base_model models/llm-local --results_dir results --dataset {TEXT} --sequence_length 16 --analysis_length 16 "
    f"{EVALUATE} --num_samples 2 --repair_samples 4 --held_out_samples 1 --analysis_samples 1 --round_to 1 "
    "--agreement_text none --dtype float32"
)
TRAIN = "--data_dir ../data --models_dir models --num_epochs 1 --batch_size 16 --max_length 16"
RECOVER = (
    f"--pruned_model results/hgsp/models --dataset {TEXT} --max_length 16 --finetune_samples 8 --batch_size 4 "
    f"--num_epochs 1 --validation_samples 2 --agreement_text none {EVALUATE} --dtype float32"
)
# Every stage's command line in the tiny world; the order is one in which each finds its inputs.
STAGES = {
    "1": f"1_finetune_teacher.py --teacher models/bert-local {TRAIN}",
    "2": f"2_distill_student.py --student models/distilbert-local {TRAIN}",
    "8": f"8_pruning_with_finetuning.py {TRAIN} --num_epochs 2 --pruning_start_epoch 1 --pruning_end_epoch 1",
    "9": "9_quantize_pruned_model.py --models_dir models --compute_dtype float32",
    "10": f"10_qat_kd_4bit.py {TRAIN} --beta_hidden 0 --compute_dtype float32",
    "7": "7_evaluate_and_generate_report.py --data_dir ../data --models_dir models --output_dir results --max_length 16"
    " --latency_repeats 1 --throughput_repeats 1 --throughput_batch_size 2 --latency_sequence_length 8"
    " --flops_sequence_length 8",
    "plot": "evaluate_plot.py --data_dir ../data --models_dir models --output_dir results --max_length 16"
    " --sequence_length 8 --inference_runs 1 --load_runs 1",
    "prune": f"run_global_pruning.py --output_name hgsp --pruning_ratio 0.3 {PRUNE}",
    "gqa": f"gqa_aware_pruning.py --output_name gqa --pruning_ratio 0.2 --protect_first 0 --protect_last 0 {PRUNE}",
    "lora": f"post_training.py --results_dir results --output_name recovered {RECOVER}",
    "full": f"post_training.py --results_dir results --output_name full --finetune_method full {RECOVER}",
    "merge": "merge_and_save_lora.py --pruned_model results/hgsp/models --lora_dir results/recovered"
    " --output_dir results/merged",
    "evaluate": "evaluate_lora_model.py --pruned_model results/hgsp/models --lora_dir results/recovered"
    f" --output_file results/lora_evaluation.json --run_evaluation ppl --dtype float32 {EVALUATE}",
    "write": "generate_text.py --base_model models/llm-local --results_dir results --tokens 64 --length 16"
    " --batch_size 2 --dtype float32",
    "download": "download_model.py --teacher ../other/bert --student ../other/distilbert --data_dir ../data"
    " --models_dir downloads",
}


# Those that write to a fixed place: what is attacked is not the question whether a result may be replaced.
OVERWRITING = ("1", "2", "9", "prune", "gqa", "lora", "full", "merge", "write")


def command(stage: str, *flags: str) -> list[str]:
    """A stage's arguments; a flag given beside them takes the place of the same one."""
    words = STAGES[stage].split() + ["--overwrite"] * (stage in OVERWRITING)
    for flag in flags:
        name, *values = flag.split(" ", 1)
        if name in words:
            place = words.index(name)
            del words[place : place + 1 + (place + 1 < len(words) and not words[place + 1].startswith("--"))]
        words += [name, *values]
    return words


def copy_code(work: Path) -> Path:
    """A copy of the scripts and the package; the repository itself is never run, read from or written to."""
    code = work / "code"
    code.mkdir()
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, code)
    shutil.copytree(REPOSITORY / "compression", code / "compression", ignore=shutil.ignore_patterns("__pycache__"))
    return code


def set_environment(work: Path) -> None:
    """Before anything is imported: one thread, no network, and nothing outside of the work folder to write to."""
    for name in ("home", "tmp"):
        (work / name).mkdir(exist_ok=True)
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    os.environ |= threads | {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "HOME": str(work / "home"),
        "HF_HOME": str(work / "home" / "hf"),
        "XDG_CACHE_HOME": str(work / "home" / "cache"),
        "MPLCONFIGDIR": str(work / "home" / "mpl"),
        "TMPDIR": str(work / "tmp"),
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }


def copy_of(template: Path, code: Path):
    """What makes a case's world."""

    def new_world(folder: Path) -> World:
        shutil.copytree(template, folder, symlinks=True)
        return World(folder, code)

    return new_world


def build(work: Path, code: Path) -> Path:
    """Make the template, with every stage's result in it; returns its path.

    Raises:
        RuntimeError: a stage does not run at all.
    """
    template = work / "template"
    for name in ("clone/models", "clone/results", "clone/.git", "clone/compression", "home", "other/documents", "data"):
        (template / name).mkdir(parents=True)
    for name in ("clone/1_finetune_teacher.py", "clone/compression/runtime.py"):
        shutil.copy(code / Path(name).relative_to("clone"), template / name)
    for name in ("clone", "clone/.git", "clone/models", "clone/results", "home", "other", "other/documents"):
        (template / name / USER_FILE).write_text(f"years of work, kept in {name}\n")
    _write_data(template / "data")
    world = World(template, code)
    answer = world.call(lambda: _write_models(template))
    if answer is not None:
        raise RuntimeError(f"the tiny models cannot be made: {answer}")
    for stage in STAGES:
        outcome = world.run(command(stage))
        if outcome.code:
            raise RuntimeError(f"{outcome.command} does not run in the tiny world:\n{outcome.stdout}{outcome.stderr}")
    shutil.rmtree(world.notes)
    return template


def _write_data(folder: Path) -> None:
    draw = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(draw.choice(LETTERS) for _ in range(words))

    for name, rows in (("train.tsv", 48), ("dev.tsv", 12)):
        lines = [f"{sentence(draw.randint(2, 10))}\t{row % 2}" for row in range(rows)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (folder / "text.txt").write_text(sentence(3000))
    (folder / "alpaca.json").write_text(
        "[" + ",".join(f'{{"instruction": "{sentence(2)}", "output": "{sentence(3)}"}}' for _ in range(12)) + "]"
    )


def _write_models(template: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    words = template / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]))
    (words / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = AutoTokenizer.from_pretrained(words)
    shutil.rmtree(words)
    size = dict(vocab_size=64, max_position_embeddings=64)
    bert = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=2, **size)
    distilbert = DistilBertConfig(dim=32, n_heads=4, hidden_dim=48, n_layers=2, **size)
    torch.manual_seed(0)
    encoders = {
        "clone/models/bert-local": BertModel(bert),
        "clone/models/distilbert-local": DistilBertModel(distilbert),
        "other/bert": BertModel(bert),
        "other/distilbert": DistilBertModel(distilbert),
        "other/three_labels": BertForSequenceClassification(
            BertConfig(**{**bert.to_dict(), "num_labels": 3, "id2label": None, "label2id": None})
        ),
    }
    for name, model in encoders.items():
        model.save_pretrained(template / name)
        tokenizer.save_pretrained(template / name)
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name in ("clone/models/llm-local", "other/llm"):
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                num_attention_heads=8,
                num_key_value_heads=4,
                intermediate_size=48,
                num_hidden_layers=3,
                max_position_embeddings=64,
                pad_token_id=0,
                initializer_range=0.2,
            )
        ).save_pretrained(template / name)
        PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(template / name)
