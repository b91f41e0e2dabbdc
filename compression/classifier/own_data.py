"""The user's own data: files, folders of them, data sets of the hub."""

import os
from pathlib import Path
from typing import Any

from compression.assets import hub_answers
from compression.classifier.columns import ColumnFlags, find_columns, find_labels, read_split
from compression.classifier.parts import HELD_OUT_ROWS, TaskData
from compression.classifier.table_files import READERS, Table, read_table, saved_tables, split_tables
from compression.classifier.tasks import make_task
from compression.runtime import UserError, log, processes

# The names of files, and of splits of a data set, by the part that they are.
PARTS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "validation_matched")}
UNUSED = "test"
FLAG = "--dataset"

Tables = dict[str, Table]


def load_own(dataset: str, asked: ColumnFlags, validation_fraction: float, use_hub: bool = True) -> TaskData:
    """A task of the labels that its training data has.

    Args:
        dataset: a file of `READERS`; a folder with such files `train` and, if it has one, `validation`, or with what
            `save_to_disk` wrote; or a data set of the hub, `name` or `name:config`.
        validation_fraction: of each class, where there is no validation part.
        use_hub: False skips the hub.

    Raises:
        UserError: there is no such data, or a row is malformed; names the row.
    """
    path = Path(dataset).expanduser()
    if os.path.isdir(path):
        name, source, tables = path.resolve().name, "a local folder", _in_folder(path)
    elif os.path.isfile(path):
        name, source, tables = path.name, "a local file", {"train": read_table(path, FLAG)}
    else:
        name, source, tables = dataset, "the Hugging Face hub", _on_hub(dataset, use_hub)
    return _task_data(name, source, tables, asked, validation_fraction)


def _task_data(name: str, source: str, tables: Tables, asked: ColumnFlags, validation_fraction: float) -> TaskData:
    columns = find_columns(tables["train"], asked)
    labels = find_labels(tables["train"], columns.label)
    ids = {label: place for place, label in enumerate(labels)}
    train, *rest = (read_split(table, columns, ids) for table in tables.values())
    if rest:
        (validation,) = rest
    else:
        train, validation = train.divide(validation_fraction)
        log.info("%s: no validation part, so %d of its rows are held out for that", name, len(validation))
    share = min(0.1, HELD_OUT_ROWS / len(train))
    return TaskData(make_task(name, columns.text, labels), name, source, *train.divide(share), validation)


def _parts(found: dict[str, Any], where: str) -> dict[str, Any]:
    """What there is of each part, by the part's name.

    Args:
        found: files or splits by their names.
    """
    parts = {}
    for part, names in PARTS.items():
        there = [name for name in names if name in found]
        if len(there) > 1:
            raise UserError(f"{where}: has {' and '.join(there)}; allowed is one {part} part")
        if there:
            parts[part] = found[there[0]]
    if "train" not in parts:
        raise UserError(f"{where}: no train part; found {', '.join(sorted(found)) or 'nothing'}")
    if UNUSED in found:
        log.info("%s: its %s part is not used; what is reported is the validation part", where, UNUSED)
    return parts


def _in_folder(folder: Path) -> Tables:
    if (folder / "dataset_dict.json").is_file():
        return _parts(saved_tables(folder, FLAG, "save it again"), f"{FLAG} {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in READERS:
            if path.stem in files:
                raise UserError(f"{FLAG} {folder}: has {files[path.stem].name} and {path.name}; allowed is one of them")
            files[path.stem] = path
    return {part: read_table(path, FLAG) for part, path in _parts(files, f"{FLAG} {folder}").items()}


def _on_hub(dataset: str, use_hub: bool) -> Tables:
    path = Path(dataset).expanduser()
    if path.suffix in READERS or path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1:
        raise UserError(f"{FLAG} {dataset}: no such file or folder; allowed are files of {', '.join(READERS)}")
    if not use_hub:
        raise UserError(f"{FLAG} {dataset}: no file or folder, and the hub is not to be asked; name a file")
    import datasets

    online = hub_answers()
    if not online:  # else it would try for half a minute
        datasets.config.HF_HUB_OFFLINE = True
    repository, _, config = dataset.partition(":")
    log.info("Reading %s from the Hugging Face %s", dataset, "hub" if online else "cache")
    try:
        with processes().main_process_first():
            splits = datasets.load_dataset(repository, config or None)
    except Exception as error:  # of several libraries; whichever it is, there is no such data
        reason = " ".join(str(error).split())[:300] if online else "the hub is not reachable and its cache lacks it"
        raise UserError(
            f"{FLAG} {dataset}: no file, no folder, and no data set of the hub ({reason}); allowed are these, and "
            "the names that --help lists"
        ) from None
    return _parts(split_tables(splits, f"{FLAG} {dataset}"), f"{FLAG} {dataset}")
