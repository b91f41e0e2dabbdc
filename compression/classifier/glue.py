"""GLUE's classification tasks: where their data comes from, and what is in its files.

It comes, in this order, from a folder that the user gives; from the task's own folder; from the Hugging Face hub or its
local cache; for sentiment from the embedded review sentences. Of several processes the first one fetches, the others
wait and find it there.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from compression.assets import NotOnHub, hub_answers, hub_snapshot
from compression.classifier.columns import Columns, read_split
from compression.classifier.parts import Split, TaskData, hold_out
from compression.classifier.reviews import split_by_film
from compression.classifier.table_files import Table, read_tsv, saved_tables
from compression.classifier.tasks import SST2, Task, make_task
from compression.embedded import install_reviews, reviews_file
from compression.files import read_object, real_path
from compression.runtime import UserError, log, processes, shown
from compression.sources import GLUE_FOLDER, SENTIMENT_FOLDER, describe_source, fetched, source_record

REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One of GLUE's tasks.

    Attributes:
        task: its name is also that of the folder that its TSV files may lie in; its texts are the columns of data sets
            that `datasets` has saved, beside `label`, a number or a name.
        subset: what the hub calls it.
        tsv: the columns of texts and label in the TSV files.
        header: all columns of these files where their first line does not name them.
        dev: the TSV file of the validation part; the other one is train.tsv.
        validation: what the hub calls that part.
        broken: some lines of GLUE's own TSV files are.
        folder: where fetched data goes.
        reviews_stand_in: the embedded review sentences are taken where the hub is not reachable.
    """

    task: Task
    subset: str
    tsv: Columns
    header: tuple[str, ...] | None = None
    dev: str = "dev.tsv"
    validation: str = "validation"
    broken: bool = False
    folder: Path = GLUE_FOLDER
    reviews_stand_in: bool = False

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def command(self) -> str:
        """What fetches the data."""
        return f"download_model.py --dataset {self.subset}"

    @property
    def saved(self) -> Columns:
        """The columns of saved data sets."""
        return Columns(self.task.text, "label")


SENTENCES = ("sentence1", "sentence2")
COLA = make_task("CoLA", ["sentence"], ["unacceptable", "acceptable"], "matthews_correlation")
MRPC = make_task("MRPC", SENTENCES, ["not_equivalent", "equivalent"], "f1")
QQP = make_task("QQP", ["question1", "question2"], ["not_duplicate", "duplicate"], "f1")
MNLI = make_task("MNLI", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"])
QNLI = make_task("QNLI", ["question", "sentence"], ["entailment", "not_entailment"])
RTE = make_task("RTE", SENTENCES, ["entailment", "not_entailment"])
WNLI = make_task("WNLI", SENTENCES, ["not_entailment", "entailment"])

GLUE = {
    "sst2": GlueTask(SST2, "sst2", Columns(SST2.text, "label"), folder=SENTIMENT_FOLDER, reviews_stand_in=True),
    "cola": GlueTask(
        COLA, "cola", Columns(COLA.text, "label"), header=("source", "label", "original_label", "sentence")
    ),
    "mrpc": GlueTask(MRPC, "mrpc", Columns(("#1 String", "#2 String"), "Quality")),
    "qqp": GlueTask(QQP, "qqp", Columns(QQP.text, "is_duplicate"), broken=True),
    "mnli": GlueTask(
        MNLI, "mnli", Columns(SENTENCES, "gold_label"), dev="dev_matched.tsv", validation="validation_matched"
    ),
    "qnli": GlueTask(QNLI, "qnli", Columns(QNLI.text, "label")),
    "rte": GlueTask(RTE, "rte", Columns(SENTENCES, "label")),
    "wnli": GlueTask(WNLI, "wnli", Columns(SENTENCES, "label")),
}
"""By the name that --dataset has for them."""


@dataclass(frozen=True)
class DataSource:
    """Files of a task that were found.

    Attributes:
        kind: what `path` is. glue_tsv: a folder with GLUE's two TSV files. saved_dataset: a folder that
            `DatasetDict.save_to_disk` wrote, with splits train and validation, and the task's columns.
            embedded: the embedded film texts, see `split_by_film`.
        path: the folder or file.
        name: what reports call the data.
        source: where the files came from, for people.
    """

    kind: Literal["glue_tsv", "saved_dataset", "embedded"]
    path: Path
    name: str
    source: str


def ensure_glue(
    glue: GlueTask, data_dir: str | None = None, folder: Path | None = None, use_hub: bool = True
) -> DataSource:
    """Make sure that a task's data lies on the disk. Nothing is fetched where it already does.

    Args:
        data_dir: a folder that the user gives, with GLUE's `train.tsv` and `dev.tsv` (also below, under the task's
            name) or with what `DatasetDict.save_to_disk` wrote (also below, as `glue/sst2`). None takes `folder`, the
            hub or the embedded default.
        folder: where fetched data goes, by default the task's own folder.
        use_hub: False skips the hub.

    Raises:
        UserError: `data_dir` holds none of these, or nothing could be fetched.
    """
    with processes().main_process_first():
        return _find_or_fetch(data_dir, glue, Path(folder or glue.folder), use_hub)


def _find_or_fetch(data_dir: str | None, glue: GlueTask, folder: Path, use_hub: bool) -> DataSource:
    if data_dir is not None and real_path(Path(data_dir), "--data_dir") != real_path(folder):
        found = find_glue(Path(data_dir).expanduser(), glue)
        if found is None:
            raise UserError(
                f"--data_dir {data_dir}: no data of {glue.name} there; allowed is a folder with GLUE's train.tsv and "
                f"{glue.dev}, or with glue/{glue.subset} as save_to_disk writes it (splits train and {glue.validation})"
            )
        return found
    found = find_glue(folder, glue)
    if found is None:
        _refuse_partial(folder, glue)
        return _fetch(folder, glue, use_hub)
    return found


def find_glue(folder: Path, glue: GlueTask) -> DataSource | None:
    """A task's data in a folder: GLUE's files before a saved data set before the embedded reviews."""
    for candidate in (folder, folder / glue.name):
        if (candidate / "train.tsv").is_file() and (candidate / glue.dev).is_file():
            return DataSource("glue_tsv", candidate, f"{glue.name} (GLUE)", "a local folder")
    for candidate in (folder, folder / "glue" / glue.subset):
        if _is_saved(candidate, glue):
            return _saved(candidate, glue)
    if glue.reviews_stand_in and reviews_file(folder / "embedded").is_file():
        return _reviews(folder)
    return None


def _saved(folder: Path, glue: GlueTask) -> DataSource:
    return DataSource("saved_dataset", folder, f"{glue.name} (GLUE)", describe_source(folder))


def _reviews(folder: Path) -> DataSource:
    path = reviews_file(folder / "embedded")
    return DataSource("embedded", path, "Rotten Tomatoes review sentences (embedded)", describe_source(path.parent))


def _is_saved(folder: Path, glue: GlueTask) -> bool:
    if not (folder / "dataset_dict.json").is_file():
        return False
    infos = [folder / split / "dataset_info.json" for split in ("train", glue.validation)]
    columns = {*glue.saved.text, glue.saved.label}
    return all(info.is_file() and columns <= set(read_object(info).get("features", {})) for info in infos)


def _refuse_partial(folder: Path, glue: GlueTask) -> None:
    """Data that the user put there incompletely is neither overwritten nor silently passed over."""
    for path in (folder / "train.tsv", folder / glue.dev, folder / glue.name, folder / "glue" / glue.subset):
        if path.exists():
            raise UserError(f"{shown(path)} is there, but not all of {glue.name}; complete it or delete it")


def _fetch(folder: Path, glue: GlueTask, use_hub: bool) -> DataSource:
    try:
        _fetch_from_hub(folder / "glue" / glue.subset, glue, use_hub)
        return _saved(folder / "glue" / glue.subset, glue)
    except NotOnHub as problem:
        if not glue.reviews_stand_in:
            raise UserError(f"{glue.name}: {problem}; give its files with --data_dir") from None
        if use_hub and hub_answers():
            log.warning("%s: %s; taking the embedded default", REPOSITORY, problem)
    install_reviews(glue.name, folder / "embedded")
    return _reviews(folder)


def _fetch_from_hub(folder: Path, glue: GlueTask, use_hub: bool) -> None:
    subset, parts = glue.subset, ("train", glue.validation)
    if use_hub and hub_answers():
        log.info("Fetching %s (%s) from the Hugging Face hub", REPOSITORY, subset)
    snapshot = hub_snapshot(REPOSITORY, "dataset", [f"{subset}/{part}-*.parquet" for part in parts], use_hub)
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()  # of what follows, which takes a second; the download had its own
    files = {part: sorted(snapshot.glob(f"{subset}/{part}-*.parquet")) for part in parts}
    if not all(files.values()):
        raise NotOnHub(f"it has no {' and '.join(f'{subset}/{part}-*.parquet' for part in parts)}")
    with fetched(folder, source_record("hub", REPOSITORY, snapshot.name)) as temporary:
        with TemporaryDirectory(dir=temporary) as scratch:
            splits = {
                part: Dataset.from_parquet([str(path) for path in paths], cache_dir=scratch)
                for part, paths in files.items()
            }
            DatasetDict(splits).save_to_disk(temporary)


def load_glue(glue: GlueTask, source: DataSource) -> TaskData:
    """The data that was found.

    Raises:
        UserError: a file or a row of it is malformed.
    """
    if source.kind == "embedded":
        return TaskData(glue.task, source.name, source.source, **split_by_film(source.path, ("rotten", "fresh")))
    if source.kind == "glue_tsv":
        train, validation = (_read_tsv(source.path / name, glue) for name in ("train.tsv", glue.dev))
    else:
        train, validation = _read_saved(source.path, glue)
    return TaskData(glue.task, source.name, source.source, *hold_out(train), validation)


def _read_tsv(path: Path, glue: GlueTask) -> Split:
    table = read_tsv(path, "--data_dir", glue.header, glue.broken)
    if not {*glue.tsv.text, glue.tsv.label} <= table.columns.keys():
        raise UserError(
            f"--data_dir {path}: the first line must name {', '.join(glue.tsv.text)} and {glue.tsv.label}, as in "
            f"GLUE's {glue.name}; found {', '.join(table.columns)}"
        )
    return _checked(table, glue.tsv, glue)


def _read_saved(path: Path, glue: GlueTask) -> tuple[Split, Split]:
    tables = saved_tables(path, "--data_dir", f"get {glue.name} again with: python {glue.command}")
    train, validation = (_checked(tables[part], glue.saved, glue) for part in ("train", glue.validation))
    return train, validation


def _checked(table: Table, columns: Columns, glue: GlueTask) -> Split:
    """Texts and labels; these are given by their numbers or names."""
    if not len(table):
        raise UserError(f"{table.name}: holds no rows; get {glue.name} again with: python {glue.command}")
    names = glue.task.labels
    ids = {str(place): place for place in range(len(names))} | {name: place for place, name in enumerate(names)}
    return read_split(table, columns, ids)
