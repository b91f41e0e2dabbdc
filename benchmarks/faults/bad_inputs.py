"""Command lines and inputs that must be refused: in one line, before anything is written."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from faults.process import Case, World, difference, everything, refusal_problems
from faults.world import STAGES, command

TIME_LIMIT = 20.0
HUGE, LONG = str(2**70), "n" * 300
BINARY = bytes(range(256)) * 4
NOT_A_CONFIG = {"a list": b"[]", "an empty object": b"{}", "text": b"once upon a time", "binary": BINARY}
BINARY_WORDS = b"\x00\xff\xfe\x01 \x80"
DEEP = b"[" * 100_000 + b"]" * 100_000

Damage = Callable[[Path], None]


@dataclass
class Row:
    """One bad input.

    Attributes:
        stage: whose command line, see `world.STAGES`.
        flags: what is added to it.
        names: one of these must be in the line; by default the flags and their values.
        damage: what is done to the case's clone before.
        what: the damage in words.
    """

    stage: str
    flags: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    damage: Damage | None = None
    what: str = ""

    def wanted(self) -> list[str]:
        given = [word for flag in self.flags for word in (flag.split()[0], Path(flag.split()[-1]).name)]
        return list(self.names) + [word[:100] for word in given if word]


def attack(row: Row) -> Callable[[World], list[str]]:
    def run(world: World) -> list[str]:
        if row.damage is not None:
            row.damage(world.clone)
        before = everything(world.root)
        outcome = world.run(command(row.stage, *row.flags), limit=TIME_LIMIT)
        problems = refusal_problems(outcome, row.wanted())
        changed = difference(before, everything(world.root))
        return problems + ([f"files: {changed}"] if changed else [])

    return run


def cases() -> list[Case]:
    tables = (ranges(), choices(), outputs(), inputs(), configs(), weights(), adapters(), data_files())
    found = []
    for row in (row for table in tables for row in table):
        line = " ".join(command(row.stage, *row.flags))
        name = " ".join((row.stage, *row.flags, row.what and f"[{row.what}]")).replace(LONG, "nnn...").strip()
        found.append(Case(name, attack(row), line))
    return found


# Values out of range.

RANGES = {
    "1": {
        "learning_rate": "nan inf -1 1e400",
        "weight_decay": "nan -1",
        "warmup_ratio": "nan 2",
        "seed": f"-1 {HUGE}",
        "max_grad_norm": "nan inf -1",
        "batch_size": f"0 -1 {HUGE}",
        "num_epochs": f"0 nan {HUGE}",
        "save_steps": "0",
        "max_length": f"0 -1 {HUGE}",
        "train_fraction": "nan 0 1.5 inf",
        "gradient_accumulation_steps": "0",
    },
    "2": {"temperature": "nan inf 0", "alpha": "nan -1 2"},
    "8": {
        "temperature_start": "nan",
        "temperature_end": "inf",
        "alpha_start": "nan",
        "head_final_sparsity": "nan 1",
        "ffn_final_sparsity": "nan inf",
        "lambda_mag": "nan inf -1",
        "lambda_grad": "nan 1e400",
        "min_delta": "nan inf",
        "finetuning_learning_rate": "nan inf",
        "patience": "0",
        "pruning_frequency": "0",
        "min_heads": f"0 {HUGE}",
        "neuron_multiple": f"0 {HUGE}",
        "pruning_start_epoch": "5",
    },
    "9": {"blocksize": "63", "embedding_bits": "3", "quant_type": "nope", "compute_dtype": "float8"},
    "10": {"beta_ce": "nan inf -1", "beta_logits": "nan", "beta_hidden": "inf", "temperature": "nan", "blocksize": "7"},
    "7": {
        "max_length": f"0 {HUGE}",
        "latency_repeats": f"0 -1 {HUGE}",
        "throughput_batch_size": HUGE,
        "seed": HUGE,
        "latency_sequence_length": "128",
        "flops_sequence_length": "128",
    },
    "plot": {"inference_runs": f"0 {HUGE}", "load_runs": "0", "seed": HUGE, "sequence_length": "3 128"},
    "prune": {
        "pruning_ratio": "nan inf -1 1",
        "temperature": "nan inf -1",
        "tau": "nan inf -1",
        "epsilon": "nan 2",
        "attention_factors": "inf nan 0 -1",
        "iterative_steps": f"0 {HUGE}",
        "round_to": f"0 {HUGE}",
        "seed": HUGE,
        "num_samples": f"0 {HUGE}",
        "repair_samples": HUGE,
        "held_out_samples": "0",
        "gradient_batch_size": f"0 {HUGE}",
        "sequence_length": f"1 128 {HUGE}",
        "analysis_length": "128",
        "eval_length": f"128 {HUGE}",
        "eval_samples": "-1",
        "protect_first": f"-1 {HUGE}",
        "analysis_samples": f"-1 {HUGE}",
        "efficiency_repeats": "0",
    },
    "gqa": {
        "pruning_ratio": "nan",
        "min_rate": "nan",
        "max_rate": "nan",
        "attention_ratio": "nan inf",
        "target_perplexity": "nan inf 0",
        "search_steps": "0",
        "iterative_rounds": "0",
        "layers": "9 5-2 x 1e3",
        "seed": HUGE,
        "sequence_length": "128",
    },
    "lora": {
        "lora_alpha": "nan inf -1 1e400",
        "lora_dropout": "nan 1",
        "lora_r": f"0 {HUGE}",
        "kd_weight": "nan",
        "kd_temperature": "nan inf",
        "finetune_samples": f"0 {HUGE}",
        "max_length": f"4 128 {HUGE}",
        "learning_rate": "nan",
        "validation_samples": f"0 {HUGE}",
        "max_grad_norm": "inf",
        "eval_length": "128",
        "seed": HUGE,
    },
    "merge": {"seed": HUGE},
    "evaluate": {"eval_length": "128", "eval_samples": f"-1 {HUGE}"},
    "write": {
        "tokens": "0",
        "length": f"0 128 {HUGE}",
        "temperature": "0 nan inf",
        "batch_size": f"0 {HUGE}",
        "seed": HUGE,
    },
}


def ranges() -> Iterable[Row]:
    for stage, fields in RANGES.items():
        for name, values in fields.items():
            for value in values.split():
                # The one that a training needs beside it for the flag to be of use.
                beside = ("--kd_weight 0.5",) if name == "kd_temperature" else ()
                yield Row(stage, (*beside, f"--{name} {value}"))


# Unknown names and combinations.


def choices() -> Iterable[Row]:
    for stage in (stage for stage in STAGES if stage != "full"):  # which is "lora" with other flags
        yield Row(stage, ("--nope 1",))
    for stage, *flags in (
        ("8", "--preset nope"),
        ("prune", "--preset nope"),
        ("1", "--preset paper"),
        ("2", "--variant nope"),
        ("1", "--amp fp16"),
        ("1", "--track nope"),
        ("prune", "--dtype float64"),
        ("prune", "--device_map cuda:9"),
        ("prune", "--device_map moon"),
        ("prune", "--importance_method nope"),
        ("gqa", "--strategy nope"),
        ("prune", "--normalize nope"),
        ("lora", "--finetune_method nope"),
        ("download", "--only nope"),
        ("write", "--device_map moon"),
        ("lora", "--lora_projections q_proj,lm_head"),
        ("prune", "--run_evaluation nope"),
        ("full", "--load_in_4bit"),
        ("full", "--dtype bfloat16"),
        ("lora", "--teacher models/llm-local"),
        ("lora", "--kd_weight 0.5", "--teacher ../other/bert"),
        ("9", "--load_in_8bit", "--double_quant"),
        ("prune", "--temperature 1", "--analysis_samples 0"),
        ("gqa", "--analysis_samples 0"),
        ("10", "--beta_ce 0", "--beta_logits 0", "--beta_hidden 0"),
        ("8", "--lambda_mag 0", "--lambda_grad 0"),
        ("8", "--pruning_end_epoch 9"),
        ("gqa", "--min_rate 0.5", "--max_rate 0.2"),
        ("gqa", "--protect_first 9"),
        ("prune", "--run_evaluation zeroshot", "--eval_zeroshot_tasks nope"),
        ("prune", "--protect_first 3"),
        ("prune", "--dataset nope"),
        ("lora", "--dataset nope"),
        ("lora", "--validation_dataset ../data/alpaca.json"),
        ("prune", "--eval_ppl_datasets nope"),
        ("prune", "--base_model nobody/nothing"),
        ("1", "--teacher nobody/none"),
        ("lora", "--gradient_accumulation_steps 9"),
        ("prune", "--finetune", "--lora_r 0"),
    ):
        yield Row(stage, tuple(flags))


# Outputs that must not be written to.


def outputs() -> Iterable[Row]:
    def link_loop(clone: Path) -> None:
        (clone / "loop").symlink_to("loop")

    def linked_documents(clone: Path) -> None:
        (clone / "link").symlink_to("../other/documents")

    nowhere_good = ("thesis.txt", "thesis.txt/below", LONG, "loop")
    not_mine = (".", "..", "models", "results", "../home", "../other", "../other/documents", "link")
    # An input, what holds it, what lies in it.
    replaced = {
        "9": ("models/student_model", "models/student_model/inside"),
        "merge": ("results/hgsp", "results/hgsp/models", "results/hgsp/models/inside", "results/recovered"),
        "lora": ("results/hgsp", "results/hgsp/models", "results/hgsp/models/inside", "results/gqa"),
        "full": ("results/hgsp", "results/hgsp/models"),
    }
    for stage, more in replaced.items():
        base = ("--pruned_model_path models/student_model",) if stage == "9" else ()
        for target in (*nowhere_good, *not_mine, *more):
            damage = {"loop": link_loop, "link": linked_documents}.get(target)
            yield Row(stage, (*base, f"--output_dir {target}"), damage=damage)
    for stage in ("lora", "prune", "gqa"):
        for name in ("..", ".", "a/b", LONG, "''"):
            yield Row(stage, (f"--output_name {name.strip(chr(39))}",), names=("--output_name",))
    for stage in ("prune", "gqa", "lora"):
        for target in nowhere_good:
            yield Row(stage, (f"--results_dir {target}",), damage=link_loop)
        yield Row(stage, ("--output_name thesis.txt", "--results_dir ."))
    for stage in ("1", "2", "8", "9", "10", "download"):
        for target in nowhere_good:
            inputs = {
                "2": ("--teacher_path models/teacher_model",),
                "8": ("--teacher_path models/teacher_model", "--student_path models/student_model"),
                "9": ("--pruned_model_path models/student_model",),
                "10": ("--teacher_path models/teacher_model", "--pruned_model_path models/student_model"),
            }.get(stage, ())
            yield Row(stage, (*inputs, f"--models_dir {target}"), damage=link_loop)
    for stage in ("7", "plot"):
        for target in nowhere_good:
            yield Row(stage, (f"--output_dir {target}",), damage=link_loop)
    for target in (*nowhere_good[1:], "thesis.txt", ".", "results", "results/hgsp/models/config.json"):
        yield Row("evaluate", (f"--output_file {target}",), damage=link_loop)
    yield Row("1", ("--teacher models/teacher_model",), what="the output itself")
    yield Row("2", ("--student models/student_model",), what="the output itself")
    yield Row("2", ("--teacher_path models/student_model",), what="the output itself")
    yield Row("prune", ("--base_model results/hgsp/models",), what="the output itself")
    yield Row("gqa", ("--base_model results/gqa/models",), what="the output itself")
    yield Row("lora", ("--output_name hgsp",), what="a pruning run's folder")
    yield Row("lora", ("--kd_weight 0.5", "--teacher ../other/llm", "--output_dir ../other/llm"))
    yield Row("merge", ("--output_dir models/llm-local",), what="another model")
    yield Row("9", ("--pruned_model_path models/student_model", "--output_dir models/teacher_model"))


# Inputs that are not there or are something else.

INPUTS = {
    "1": ("--teacher",),
    "2": ("--student", "--teacher_path"),
    "8": ("--student_path", "--teacher_path"),
    "9": ("--pruned_model_path",),
    "10": ("--pruned_model_path", "--teacher_path"),
    "prune": ("--base_model",),
    "gqa": ("--base_model",),
    "lora": ("--pruned_model",),
    "merge": ("--pruned_model", "--lora_dir"),
    "evaluate": ("--pruned_model", "--lora_dir", "--merged_model", "--dense_model"),
    "download": ("--teacher",),
}


def inputs() -> Iterable[Row]:
    def prepare(clone: Path) -> None:
        (clone / "loop").symlink_to("loop")
        (clone / "empty").mkdir()

    for stage, flags in INPUTS.items():
        for flag in flags:
            for value in ("./nowhere", "./empty", "./thesis.txt", "./loop", f"./{LONG}"):
                yield Row(stage, (f"{flag} {value}",), damage=prepare)
    for stage, flag in (
        ("2", "--teacher_path"),
        ("8", "--teacher_path"),
        ("8", "--student_path"),
        ("10", "--teacher_path"),
        ("10", "--pruned_model_path"),
    ):
        yield Row(stage, (f"{flag} ../other/three_labels",), what="three labels")
    for stage, flag in (("prune", "--base_model"), ("lora", "--pruned_model"), ("evaluate", "--dense_model")):
        yield Row(stage, (f"{flag} ../other/bert",), what="no language model")
    yield Row("1", ("--teacher models/llm-local",), what="no encoder")
    yield Row("8", ("--student_path models/llm-local",), what="no encoder")
    yield Row("9", ("--pruned_model_path models/pruned_quantized_final",), what="quantized already")
    yield Row("merge", ("--lora_dir results/hgsp/models",), what="no adapter")
    for stage in ("7", "plot"):
        yield Row(stage, ("--models_dir empty",), damage=prepare)


# Configurations, tokenizers and records that hold something else.


def pruned(clone: Path) -> Path:
    return next((clone / "models").glob("pruning_with_finetuning_*"))


TEACHER, STUDENT, LLM = "models/teacher_model", "models/student_model", "models/llm-local"
DECODER, ADAPTER = "results/hgsp/models", "results/recovered"
# Which stage reads which folder.
READ_BY = (("2", TEACHER), ("8", STUDENT), ("9", "models/pruned"), ("prune", LLM), ("merge", DECODER), ("7", TEACHER))


def place(clone: Path, folder: str) -> Path:
    return pruned(clone) if folder == "models/pruned" else clone / folder


def forget_checksums(folder: Path) -> None:
    """As if the checkpoint had been made elsewhere: what is tested is what a file says, not that it changed."""
    path = folder / "stage.json"
    if path.is_file():
        stage = json.loads(path.read_text())
        if isinstance(stage, dict) and stage.pop("files", None) is not None:
            path.write_text(json.dumps(stage, indent=2))


@dataclass
class Write:
    """Puts other contents into a file of a folder."""

    folder: str
    name: str
    contents: bytes

    def __call__(self, clone: Path) -> None:
        folder = place(clone, self.folder)
        forget_checksums(folder)
        (folder / self.name).write_bytes(self.contents)


@dataclass
class Edit:
    """Changes fields of a JSON file; None takes a field away."""

    folder: str
    name: str
    fields: dict = field(default_factory=dict)

    def __call__(self, clone: Path) -> None:
        folder = place(clone, self.folder)
        forget_checksums(folder)
        path = folder / self.name
        value = json.loads(path.read_text()) | self.fields
        path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def names_of(folder: str, *more: str) -> tuple[str, ...]:
    return ("pruning_with_finetuning_" if folder == "models/pruned" else Path(folder).name, *more)


def configs() -> Iterable[Row]:
    for stage, folder in READ_BY:
        for what, contents in NOT_A_CONFIG.items():
            for name in ("config.json", "stage.json", "tokenizer.json", "tokenizer_config.json"):
                # A record without contents is as good as none; a tokenizer may do without settings.
                harmless = what == "an empty object" and name in ("stage.json", "tokenizer_config.json")
                if harmless or (folder == LLM and name == "stage.json"):
                    continue
                yield Row(stage, (), names_of(folder, name), Write(folder, name, contents), f"{folder}/{name}: {what}")
    for stage, folder in (("9", "models/pruned"), ("merge", DECODER)):
        for value in (
            [],
            "wide",
            {"0": 5},
            {"0": {"num_attention_heads": "two"}},
            {"zero": {"intermediate_size": 8}},
            {"0": {"intermediate_size": -8}},
            {"0": {"skip": "attention, please"}},
            {"99": {}},
        ):
            damage = Edit(folder, "config.json", {"per_layer_config": value})
            yield Row(stage, (), names_of(folder, "per_layer_config"), damage, f"per_layer_config {json.dumps(value)}")
    for stage, folder in (("1", "models/bert-local"), ("8", STUDENT), ("prune", LLM), ("lora", DECODER)):
        yield Row(stage, (), names_of(folder, "tokenizer"), few_words(folder), f"{folder}: more tokens than embeddings")


def few_words(folder: str) -> Damage:
    """The first ten rows of the word table are all there are."""

    def cut(clone: Path) -> None:
        edit_weights(
            place(clone, folder) / "model.safetensors",
            lambda tensors: {
                name: tensor[:10].clone()
                if "word_embeddings" in name or "embed_tokens" in name or "lm_head" in name
                else tensor
                for name, tensor in tensors.items()
            },
        )
        Edit(folder, "config.json", {"vocab_size": 10})(clone)

    return cut


# Weights that are not what the configuration says.


def edit_weights(path: Path, change: Callable[[dict], dict]) -> None:
    from safetensors.torch import load_file, save_file

    forget_checksums(path.parent)
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def spoil(folder: str, how: str) -> Damage:
    """A NaN, a tensor too few, one too many, one of another shape."""

    def change(tensors: dict) -> dict:
        matrices = sorted(name for name, tensor in tensors.items() if tensor.dim() == 2 and "embed" not in name)
        name = matrices[len(matrices) // 2]
        if how == "a NaN":
            tensors[name][0, 0] = float("nan")
        elif how == "an infinity":
            tensors[name][-1, -1] = float("inf")
        elif how == "a tensor missing":
            del tensors[name]
        elif how == "a tensor too many":
            tensors[name.replace(".weight", ".wait")] = tensors[name].clone()
        else:
            tensors[name] = tensors[name][:-1].clone()
        return tensors

    def damage(clone: Path) -> None:
        name = "adapter_model.safetensors" if folder == ADAPTER else "model.safetensors"
        edit_weights(place(clone, folder) / name, change)

    return damage


SPOILED = ("a NaN", "an infinity", "a tensor missing", "a tensor too many", "a tensor of another shape")


def weights() -> Iterable[Row]:
    readers = (
        ("1", "models/bert-local"),
        ("2", TEACHER),
        ("8", STUDENT),
        ("8", TEACHER),
        ("9", "models/pruned"),
        ("10", "models/pruned"),
        ("7", TEACHER),
        ("plot", STUDENT),
        ("prune", LLM),
        ("gqa", LLM),
        ("lora", DECODER),
        ("full", DECODER),
        ("merge", DECODER),
        ("merge", ADAPTER),
        ("evaluate", DECODER),
        ("evaluate", ADAPTER),
    )
    for stage, folder in readers:
        for how in SPOILED:
            if (stage, how) != ("1", "a tensor too many"):  # a pooler or a head that the start does not need is common
                yield Row(stage, (), names_of(folder, "safetensors"), spoil(folder, how), f"{folder}: {how}")


def adapters() -> Iterable[Row]:
    for fields in (
        {"r": "eight"},
        {"r": 0},
        {"r": 2**70},
        {"lora_alpha": "much"},
        {"lora_alpha": float("nan")},
        {"target_modules": 5},
        {"target_modules": []},
        {"peft_type": "NOPE"},
        {"peft_type": None},
        {"rank_pattern": [1]},
        {"lora_dropout": "x"},
        {"bias": 7},
        {"modules_to_save": 3},
    ):
        for stage in ("merge", "evaluate"):
            damage = Edit(ADAPTER, "adapter_config.json", fields)
            if fields != {"peft_type": None} or stage == "merge":
                yield Row(stage, (), names_of(ADAPTER, "adapter_config.json"), damage, f"adapter {json.dumps(fields)}")
    for what, contents in NOT_A_CONFIG.items():
        damage = Write(ADAPTER, "adapter_config.json", contents)
        yield Row("merge", (), names_of(ADAPTER, "adapter_config.json"), damage, f"adapter_config.json: {what}")


# Data.


def data_files() -> Iterable[Row]:
    def put(name: str, contents: bytes) -> Damage:
        def write(clone: Path) -> None:
            path = clone / ".." / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)

        return write

    rows = b"\n".join(b"a b c\t%d" % (row % 2) for row in range(40))
    tables = {
        "no header": rows,
        "a label 2": b"sentence\tlabel\n" + rows + b"\na b\t2",
        "binary": BINARY,
        "empty": b"",
        "a header alone": b"sentence\tlabel\n",
        "no tab": b"sentence\tlabel\n" + rows + b"\na b",
        "UTF-16": ("sentence\tlabel\n" + rows.decode()).encode("utf-16"),
        "NaN": b"sentence\tlabel\na\tnan\n" + rows,
        "binary sentences": b"sentence\tlabel\n" + b"\n".join(BINARY_WORDS + b"\t%d" % (n % 2) for n in range(40)),
    }
    for name in ("train.tsv", "dev.tsv"):
        for what, contents in tables.items():
            yield Row("1", (), (name,), put(name, contents), f"{name}: {what}")
    yield Row("1", (), ("data", "train.tsv"), put("train.tsv", b"sentence\tlabel\na\t1\nb\t0"), "two sentences")
    for name in ("train.tsv", "dev.tsv"):
        yield Row("1", (), ("data", name), lambda clone, name=name: (clone / "../data" / name).unlink(), f"no {name}")

    one = b'{"instruction": "a", "output": "b"}'
    instructions = {
        "binary.json": BINARY,
        "utf16.json": f"[{one.decode()}]".encode("utf-16"),
        "deep.json": DEEP,
        "one.json": one,
        "numbers.json": b"[1, 2]",
        "empty.json": b"[]",
        "cut.jsonl": one + b"\n{",
        "deep.jsonl": DEEP,
        "binary.jsonl": BINARY,
        "short.json": b'[{"instruction": "a"}]',
        "number.json": b'[{"instruction": 1, "output": 2}]',
        "huge.json": b'[{"instruction": "a", "output": ' + b"9" * 5000 + b"}]",
    }
    for name, contents in instructions.items():
        yield Row(
            "lora", (f"--dataset ../data/{name}", "--validation_dataset ../data/text.txt"), (name,), put(name, contents)
        )
    texts = {
        "binary.txt": BINARY * 200,
        "utf16.txt": ("a b c d " * 2000).encode("utf-16"),
        "empty.txt": b"",
        "short.txt": b"a b c",
    }
    for name, contents in texts.items():
        for stage in ("prune", "lora"):
            for flag in ("dataset", "eval_ppl_datasets"):
                yield Row(stage, (f"--{flag} ../data/{name}",), (name,), put(name, contents))
    asked = b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n'
    questions = {
        "text": b"once upon a time",
        "a list": b"[]",
        "no columns": b"{}\n{}",
        "binary": BINARY,
        "empty": b"",
        "a label 7": asked + asked.replace(b"0}", b"7}"),
        "numbers": b"1\n2\n",
        "cut": asked + asked[:20],
        "a wrong type": asked + b'{"goal": 1, "sol1": [], "sol2": {}, "label": "x"}',
        "UTF-16": asked.decode().encode("utf-16"),
    }
    zero_shot = ("--run_evaluation zeroshot", "--eval_zeroshot_tasks piqa", "--data_dir ../data")
    for what, contents in questions.items():
        name = "zeroshot/piqa/validation.jsonl"
        yield Row("evaluate", zero_shot, ("validation.jsonl", "piqa"), put(name, contents), f"{name}: {what}")
    yield Row("prune", ("--dataset wikitext2", "--data_dir ../data"), ("wiki.train",), None, "no such text")
    yield Row("1", ("--data_dir ../other",), ("../other",), None, "no sentences")
