"""The model card of a checkpoint or an export: a README.md that the hub shows, made from `stage.json` and the files.

Header and layout are those of https://huggingface.co/docs/hub/model-cards (Mitchell et al. 2019, "Model Cards for Model
Reporting"). A card is written once, before the record that lists it, and is its reader's from then on: a changed or
deleted one harms nothing. It names no path outside the repository but by the last name.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from compression.embedded import BERT_PACKAGE, LLM_PACKAGE
from compression.files import read_object
from compression.integrity import WEIGHT_FILES
from compression.lineage import (
    Ancestor,
    Record,
    ancestors,
    as_object,
    data_of,
    input_of,
    public,
    public_path,
    short_name,
)
from compression.runtime import ROOT, UserError
from compression.sources import LLM, STUDENT, TEACHER
from compression.tables import Column, at, markdown_table

# What is known of stages, base models and data by name.


@dataclass(frozen=True)
class Kind:
    """What a stage makes: a noun phrase, and the hub's tags."""

    about: str
    tags: tuple[str, ...] = ()


KINDS = {
    "teacher": Kind("a classifier that smaller ones learn from"),
    "student": Kind("a small classifier that learned from its teacher and the labels", ("distillation",)),
    "student_softlabel": Kind(
        "a small classifier that learned from its teacher's soft labels alone", ("distillation",)
    ),
    "pruned": Kind(
        "a classifier that lost attention heads and FFN neurons while it learned from its teacher",
        ("pruning", "distillation"),
    ),
    "pruned_qkd4bit": Kind(
        "a pruned classifier that was trained with the 4-bit weights it computes with (QAT), and learned from its "
        "teacher",
        ("pruning", "quantization", "distillation"),
    ),
    "global_pruning": Kind("a language model pruned in depth and width under one budget (H-GSP)", ("pruning",)),
    "gqa_pruning": Kind(
        "a language model pruned layer by layer, query heads together with their key-value head", ("pruning",)
    ),
    "recovery": Kind("a language model after recovery training of all its weights", ("recovery-training",)),
    "recovery_lora": Kind("LoRA adapters from recovery training of a language model", ("recovery-training", "lora")),
    "merged": Kind("a language model with LoRA adapters merged into its weights", ("lora",)),
}
"""By the name of the stage."""
DERIVED = {
    "quantized": Kind("{}, quantized after training", ("quantization",)),
    "onnx": Kind("an ONNX export of {}", ("onnx",)),
    "gguf": Kind("a GGUF export of {}", ("gguf",)),
}
"""By the last word of a stage's name, what was done to the model of the stage before it, which stands at the braces."""


def kind_of(stage: str) -> Kind:
    """What a stage makes; of one that is not known, a model."""
    if stage in KINDS:
        return KINDS[stage]
    before, _, last = stage.rpartition("_")
    if last not in DERIVED:
        return Kind("a model")
    made, step = kind_of(before), DERIVED[last]
    return Kind(step.about.format(made.about), made.tags + step.tags)


@dataclass(frozen=True)
class Base:
    """A model on the hub, and its license; None where it is not known."""

    name: str | None = None
    license: str | None = None


BASES = {
    TEACHER: Base("google-bert/bert-base-uncased", "apache-2.0"),
    STUDENT: Base("distilbert/distilbert-base-uncased", "apache-2.0"),
    LLM: Base(LLM, "apache-2.0"),
    BERT_PACKAGE.name: Base("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    LLM_PACKAGE.name: Base(LLM, "apache-2.0"),
}
"""By the name in `source.json`: what the default names are called today, and what the embedded packages hold."""
GLUE = ("SST-2", "CoLA", "MRPC", "QQP", "MNLI", "QNLI", "RTE", "WNLI")
DATASETS = {
    **{f"{task} (GLUE)": ("nyu-mll/glue", task.lower().replace("-", "")) for task in GLUE},
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank"),
}
"""Data set on the hub and its configuration, by the name that records have for the data."""


# How each format is loaded.


@dataclass(frozen=True)
class Format:
    """Files of one kind.

    Attributes:
        library: what the hub calls the library that loads them.
        pattern: of the file by whose presence the format is known.
        load: how they are loaded.
    """

    library: str
    pattern: str
    load: Callable[["Checkpoint"], str]


def load_transformers(checkpoint: "Checkpoint") -> str:
    trust = ", trust_remote_code=True" if checkpoint.brings_code else ""
    auto = checkpoint.auto_class
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'folder = "{checkpoint.place}"  # or its name on the hub',
        f"model = {auto}.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
    ]
    notes = []
    if trust:
        notes.append(
            "The folder brings its own modeling file, for layers that differ in width; it needs torch and transformers "
            "5.14 or newer. Where `compression` is imported `trust_remote_code` is not needed."
        )
    if checkpoint.bits:
        notes.append(f"The weights are stored in {checkpoint.bits} bits: `pip install bitsandbytes`.")
    return "\n\n".join([fenced("python", lines), *notes])


def load_adapter(checkpoint: "Checkpoint") -> str:
    parent = checkpoint.lineage[0].place if checkpoint.lineage else "BASE_MODEL"
    trust = ", trust_remote_code=True" if checkpoint.brings_code else ""
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base, adapters = "{parent}", "{checkpoint.place}"  # or their names on the hub',
        f"model = AutoModelForCausalLM.from_pretrained(base{trust})",
        "model = PeftModel.from_pretrained(model, adapters)",
        f"tokenizer = AutoTokenizer.from_pretrained(base{trust})",
    ]
    return (
        f"{fenced('python', lines)}\n\nThe adapters fit that model alone; `merge_and_save_lora.py` makes one of both."
    )


def load_onnx(checkpoint: "Checkpoint") -> str:
    lines = [
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        f'folder = "{checkpoint.place}"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{checkpoint.file}")',
        'words = tokenizer(["a fine film"], return_tensors="np")',
        "logits = session.run(None, {entry.name: words[entry.name] for entry in session.get_inputs()})[0]",
    ]
    return fenced("python", lines)


def load_gguf(checkpoint: "Checkpoint") -> str:
    return fenced("bash", [f'llama-cli -m "{checkpoint.place}/{checkpoint.file}" -p "Once upon a time"'])


def fenced(language: str, lines: list[str]) -> str:
    """A block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


FORMATS = [
    Format("peft", "adapter_config.json", load_adapter),
    Format("gguf", "*.gguf", load_gguf),
    Format("onnx", "*.onnx", load_onnx),
]
TRANSFORMERS = Format("transformers", "config.json", load_transformers)
"""What is none of the others."""


# Figures.


@dataclass(frozen=True)
class Figure:
    """What was measured of a model on some data, and of the one it was made from."""

    metric: str
    value: float
    data: str
    split: str
    amount: str
    before: float | None = None

    def result(self, task: str) -> EvalResult:
        """As the hub's model index has it."""
        name, config = DATASETS.get(self.data, (re.sub(r"\W+", "-", self.data.lower()).strip("-"), None))
        return EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=self.data,
            dataset_config=config,
            dataset_split=self.split or None,
            dataset_args={"amount": self.amount},
            metric_type=self.metric,
            metric_value=self.value,
        )


def figures_of(stage: Record) -> Iterator[Figure]:
    """A classifier's metric on its validation data; a language model's perplexities and zero-shot accuracies, and how
    far its predictions are from the dense model's."""
    metrics, data = as_object(stage.get("metrics")), as_object(stage.get("data"))
    for name, value in metrics.items():
        if f"selection_{name}" in metrics and isinstance(data.get("name"), str):
            before = metrics.get(f"{name}_before", metrics.get(f"{name}_fp32"))
            yield Figure(name, value, data["name"], "validation", f"n = {data.get('validation')}", before)
    model, dense = (
        as_object(metrics.get(new) or metrics.get(old)) for new, old in (("pruned", "after"), ("dense", "before"))
    )
    for text, value in as_object(model.get("perplexity")).items():
        windows, length = model["perplexity_windows"][text]
        before = as_object(dense.get("perplexity")).get(text)
        yield Figure("perplexity", value, text, "test", f"{windows} windows of {length} tokens", before)
    for task, found in as_object(model.get("zeroshot")).items():
        before = as_object(as_object(dense.get("zeroshot")).get(task)).get("acc")
        yield Figure("accuracy", found["acc"], task, "", f"zero-shot, n = {found['n']}", before)
    if compared := as_object(metrics.get("agreement") or model.get("agreement")):
        windows, length = compared["windows"]
        where = compared["text"]["name"], compared["text"]["part"], f"{windows} windows of {length} tokens"
        earlier = as_object(dense.get("agreement"))
        before = earlier["perplexity"]["pruned"] if earlier else compared["perplexity"]["dense"]
        yield Figure("perplexity", compared["perplexity"]["pruned"], *where, before)
        yield Figure("kl_from_dense", compared["kl"], *where, earlier.get("kl"))
        yield Figure("top1_agreement_with_dense", compared["top1"], *where, earlier.get("top1"))


def other_figures(stage: Record) -> dict[str, float]:
    """The numbers among a stage's metrics that stand for themselves, those of groups as `group.name`."""
    known = {"dense", "pruned", "before", "after", "efficiency", "agreement"}
    found: dict[str, float] = {}
    for name, value in as_object(stage.get("metrics")).items():
        inner = value if isinstance(value, dict) and name not in known else {}
        entries = {name: value} | {f"{name}.{key}": number for key, number in inner.items()}
        found |= {key: number for key, number in entries.items() if isinstance(number, int | float)}
    shown = {name for figure in figures_of(stage) for name in (figure.metric, f"{figure.metric}_before")}
    return {name: value for name, value in found.items() if name not in shown}


def hub_data(entry: Record) -> str | None:
    """The name on the hub of a record's data, None where it is not known."""
    source, *name = str(entry.get("source")).split()
    if source == "hub" and name:
        return name[0]
    return DATASETS.get(entry["name"], (None,))[0]


# The checkpoint and its card.


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is written just now.

    Attributes:
        folder: where its files are.
        stage: its record.
        target: where it will be.
    """

    folder: Path
    stage: Record
    target: Path

    @property
    def place(self) -> str:
        return public_path(self.target)

    @property
    def name(self) -> str:
        return short_name(self.target)

    @cached_property
    def config(self) -> Record:
        """Of the model; of adapters, and of exports that have none, the parent's."""
        folders = [self.folder, *(ancestor.path for ancestor in self.lineage[:1])]
        return next((found for found in map(config_in, folders) if found), {})

    @cached_property
    def lineage(self) -> list[Ancestor]:
        return ancestors(self.stage)

    @cached_property
    def format(self) -> Format:
        return next((entry for entry in FORMATS if any(self.folder.glob(entry.pattern))), TRANSFORMERS)

    @property
    def file(self) -> str:
        """The file that the format is known by, the first where there are several."""
        return min(path.name for path in self.folder.glob(self.format.pattern))

    @property
    def kind(self) -> Kind:
        stage = str(self.stage.get("stage"))
        return kind_of(f"{stage}_lora" if self.library == "peft" else stage)

    @property
    def library(self) -> str:
        return self.format.library

    @property
    def brings_code(self) -> bool:
        """Whether the model has a modeling file of its own."""
        return "auto_map" in self.config

    @property
    def bits(self) -> int | None:
        """Of stored weights where they are quantized by bitsandbytes."""
        quantization = as_object(self.config.get("quantization_config"))
        return 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else None

    @property
    def _head(self) -> tuple[str, str | None]:
        architectures = str(self.config.get("architectures"))
        return next((found for name, found in HEADS.items() if name in architectures), ("AutoModel", None))

    @property
    def auto_class(self) -> str:
        """The Auto class that loads the model."""
        return self._head[0]

    @property
    def task(self) -> str | None:
        """What the hub calls the model's task."""
        return self._head[1]

    @property
    def base(self) -> Base:
        """The model on the hub that the lineage begins with."""
        source = self.lineage[-1].record if self.lineage else {}
        name, kind = source.get("name"), source.get("source")
        if not isinstance(name, str) or kind not in ("hub", "embedded"):
            return Base()
        return BASES.get(name, Base(name if kind == "hub" else None))

    @property
    def data(self) -> list[Record]:
        """What the checkpoint and those that it was made from were trained or calibrated on, each data once."""
        adapter = input_of(self.stage, "adapter")
        records = [self.stage, *([adapter.record] if adapter else []), *(step.record for step in self.lineage)]
        entries = [entry for record in records for entry in data_of(record)]
        return list({entry["name"]: entry for entry in reversed(entries)}.values())[::-1]

    @property
    def labels(self) -> list[str]:
        """A classifier's label names; none where they are those that transformers gives (LABEL_0, ...)."""
        names = as_object(self.config.get("id2label")) if self.task == "text-classification" else {}
        labels = [" ".join(str(names[key]).split()) for key in sorted(names, key=lambda key: (len(key), key))]
        return [] if labels == [f"LABEL_{place}" for place in range(len(labels))] else labels

    @cached_property
    def figures(self) -> list[Figure]:
        return list(figures_of(self.stage))


HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
}
"""Auto class and task by the end of the model class's name."""


def model_card(folder: Path, stage: Record, target: Path) -> str:
    """The text of a README.md.

    Args:
        folder: all files of the checkpoint but record and card.
        stage: what `stage.json` will say.
        target: where the folder will be.
    """
    checkpoint = Checkpoint(Path(folder), stage, Path(target))
    sections = [
        f"# {checkpoint.name}",
        opening(checkpoint),
        figures_section(checkpoint),
        sizes_section(checkpoint),
        f"## How to load\n\n{checkpoint.format.load(checkpoint)}",
        settings_section(checkpoint),
        citation(),
    ]
    return str(ModelCard(f"---\n{header(checkpoint).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"))


def header(checkpoint: Checkpoint) -> ModelCardData:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    base, figures = checkpoint.base, checkpoint.figures
    tags = ["compression", *checkpoint.kind.tags]
    tags += [f"{checkpoint.bits}-bit"] * bool(checkpoint.bits)
    tags += ["custom_code"] * (checkpoint.brings_code and checkpoint.library == "transformers")
    # The hub takes adapters for the base's own, but these fit what became of it.
    apart = checkpoint.library == "peft" and len(checkpoint.lineage) > 1
    results = [figure.result(checkpoint.task or "other") for figure in figures]
    return ModelCardData(
        language="en",
        license=base.license,
        library_name=checkpoint.library,
        pipeline_tag=checkpoint.task,
        tags=list(dict.fromkeys(tags)),
        base_model=base.name,
        base_model_relation="finetune" if base.name and apart else None,
        datasets=list(dict.fromkeys(filter(None, map(hub_data, checkpoint.data)))) or None,
        metrics=list(dict.fromkeys(figure.metric for figure in figures)) or None,
        model_name=checkpoint.name if results else None,
        eval_results=results or None,
    )


def opening(checkpoint: Checkpoint) -> str:
    """What the model is, and what it was made from and learned from."""
    about = checkpoint.kind.about
    lines = [f"{about[0].upper()}{about[1:]}.", ""]
    if checkpoint.lineage:
        lines.append(f"- Made from: {' ← '.join(step.about for step in checkpoint.lineage)}")
    for role, title in {"teacher": "Teacher", "adapter": "Adapters"}.items():
        if (step := input_of(checkpoint.stage, role)) is not None:
            lines.append(f"- {title}: `{step.place}`")
    if labels := checkpoint.labels:
        lines.append(f"- Labels, from 0: {', '.join(f'`{label}`' for label in labels)}")
    for entry in checkpoint.data:
        lines.append(f"- Data: {public(entry['name'])} ({public(entry.get('source'))})")
    return "\n".join(lines).strip()


def figures_section(checkpoint: Checkpoint) -> str:
    """A table of what was measured, then one of what else the record says in numbers."""
    columns = [
        Column("metric", lambda figure: figure.metric),
        Column("value", lambda figure: figure.value, "{:.4f}"),
        Column("before", lambda figure: figure.before, "{:.4f}", missing=""),
        Column("data", lambda figure: " ".join(filter(None, [public(figure.data), figure.split]))),
        Column("measured on", lambda figure: figure.amount),
    ]
    others = [Column("figure", at(0)), Column("value", at(1))]
    tables = []
    if checkpoint.figures:
        tables.append(markdown_table(columns, checkpoint.figures))
    if further := other_figures(checkpoint.stage):
        rows = [(name, f"{value:,}" if isinstance(value, int) else f"{value:.6g}") for name, value in further.items()]
        tables.append(markdown_table(others, rows))
    return "\n\n".join(["## Figures", *tables]) if tables else ""


def sizes_section(checkpoint: Checkpoint) -> str:
    """Parameters, bytes and layers beside those of the model it was made from; where layers differ, each of them."""
    own = sizes_in(checkpoint.folder, checkpoint.config)
    before = {}
    if checkpoint.lineage:
        parent = checkpoint.lineage[0].path
        before = sizes_in(parent, config_in(parent))
    columns = [
        Column("size", lambda name: name),
        Column("this", lambda name: own.get(name), "{:,}", missing="as before"),
        Column("made from", lambda name: before.get(name), "{:,}", missing=""),
    ]
    names = [name for name in SIZES if name in own or name in before]
    sections = ["## Sizes", markdown_table(columns, names)] if names else []
    if layers := layer_sizes(checkpoint.config):
        titles = [Column("layer", at(0)), *(Column(title, at(1, title)) for title in layers[0])]
        sections.append(folded("Layers", markdown_table(titles, list(enumerate(layers)))))
    return "\n\n".join(sections)


# Of sizes that a config says: what the card calls them -> the config's name.
CONFIGURED = {"layers": "num_hidden_layers", "tokens": "vocab_size", "rank of the embeddings": "embedding_rank"}
SIZES = ("parameters", "bytes of weights", *CONFIGURED)


def sizes_in(folder: Path, config: Record) -> dict[str, int]:
    """What is known of `SIZES`; values of stored 4- and 8-bit weights are no parameters, and other formats not read."""
    files = [path for path in folder.glob("*") if path.suffix in WEIGHT_FILES]
    found = {"bytes of weights": sum(path.stat().st_size for path in files)} if files else {}
    if "quantization_config" not in config and (count := parameters_in(folder)):
        found["parameters"] = count
    config = {"num_hidden_layers": config.get("n_layers")} | config  # DistilBERT's name
    return found | {name: config[key] for name, key in CONFIGURED.items() if isinstance(config.get(key), int)}


def parameters_in(folder: Path) -> int:
    """Values in a folder's safetensors files, by their headers; 0 where one cannot be read."""
    count = 0
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return 0
    return count


def layer_sizes(config: Record) -> list[dict[str, str]]:
    """Of each layer what is left of its heads and neurons, and of how many; empty where all layers are alike."""
    own = as_object(config.get("per_layer_config"))
    titles = {
        "attention heads": ("num_attention_heads", "attention"),
        "key-value heads": ("num_key_value_heads", "attention"),
        "neurons": ("intermediate_size", "mlp"),
    }

    def left(layer: Record, field: str, part: str) -> str:
        count = 0 if part in layer.get("skip", ()) else layer.get(field, config[field])
        return f"{count:,} of {config[field]:,}"

    layers = [as_object(own.get(str(index))) for index in range(config.get("num_hidden_layers", 0))] if own else []
    return [{title: left(layer, *names) for title, names in titles.items() if names[0] in config} for layer in layers]


def settings_section(checkpoint: Checkpoint) -> str:
    """Settings and versions, folded."""
    settings = public(as_object(checkpoint.stage.get("config")))
    environment = as_object(checkpoint.stage.get("environment"))
    made_with = [f"{name} {environment[key]}" for key, name in VERSIONS.items() if key in environment]
    columns = [Column("setting", at(0)), Column("value", lambda row: f"`{json.dumps(row[1])}`")]
    parts = [markdown_table(columns, list(settings.items()), align="---")] if settings else []
    parts += [f"Made with {', '.join(made_with)}."] * bool(made_with)
    return folded("Settings", "\n\n".join(parts)) if parts else ""


VERSIONS = {"torch": "torch", "transformers": "transformers", "git_commit": "the project's commit"}
"""What the card names of the environment, and how."""


def folded(title: str, text: str) -> str:
    """Text that is shown when its title is clicked."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


NAMES = ("name", "given-names", "family-names")
"""Fields of an author in CITATION.cff: an entity has the first, a person the others."""


@cache
def citation() -> str:
    """The project's own, from CITATION.cff; empty where that cannot be read: no model is lost for it."""
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        authors = (" ".join(author[name] for name in NAMES if name in author) for author in cited["authors"])
        return f"## Citation\n\n{', '.join(authors)}: *{cited['title']}*, version {cited['version']}."
    return ""


def config_in(folder: Path) -> Record:
    """A folder's config.json, empty where it has none."""
    path = Path(folder) / "config.json"
    with suppress(UserError):
        return read_object(path) if path.is_file() else {}
    return {}
