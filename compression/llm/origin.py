"""Where a pruned model comes from, by the records: the dense one, which of its layers each layer was, how much went."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compression.checkpoint import load_skeleton
from compression.files import read_object, restore_replaced
from compression.lineage import Record, ancestors, as_object
from compression.runtime import ROOT, UserError
from compression.stage_record import contents, identify, read_stage
from compression.structures import layers_of

KEPT_LAYERS = "kept_layers"
"""Among the metrics of a pruned checkpoint: of each of its layers, its place in the model that it was made from."""

PRUNINGS = ("global_pruning", "gqa_pruning")
"""The stages that remove something."""


def dense_of(folder: Path, flag: str) -> Path:
    """What a checkpoint was before any pruning that the records tell of; without one, what it was made from.

    Args:
        flag: what needs it, for the error text.

    Raises:
        UserError: the records do not say, or it is not there any more.
    """
    records = [record for _, record in _way_back(folder)]
    first = ([record for record in records if record.get("stage") in PRUNINGS] or records[:1])[-1]
    parent, digest = first.get("parent"), contents(first.get("inputs")).get("parent")
    needs = f"{flag}: needs the dense model, and {folder}"
    if not isinstance(parent, str):
        raise UserError(f"{needs} does not say what it was made from (stage.json); name it: --teacher")
    dense = ROOT / parent
    restore_replaced(dense)
    there = (dense / "config.json").is_file()
    if not there or digest not in (None, identify(dense)["sha256"]):
        what = "holds other weights now" if there else "is not there"
        raise UserError(f"{needs} was made from {dense}, which {what}; name it: --teacher")
    return dense


def kept_layers(folder: Path, dense: Path, flag: str) -> list[int]:
    """Of each layer of a checkpoint its place in the dense model.

    The records of the checkpoint and of those between it and the dense model are followed. Where one does not say which
    layers stayed, all of them did, which their number must confirm.

    Args:
        flag: what needs them, for the error text.

    Raises:
        UserError: the records do not say.
    """
    places: Any = None
    for made, parent, record in reversed(_steps(folder, dense)):
        depth, before = (read_object(path / "config.json")["num_hidden_layers"] for path in (made, parent))
        kept = as_object(record.get("metrics")).get(KEPT_LAYERS)
        if kept is None and depth != before:
            raise UserError(
                f"{flag}: {made} has {depth} of the {before} layers of {parent}, and its stage.json does not say "
                "which; prune anew with python run_global_pruning.py, or leave the flag out"
            )
        kept = range(depth) if kept is None else kept
        places = list(kept) if places is None else [places[place] for place in kept]
    return places


def _steps(folder: Path, dense: Path) -> list[tuple[Path, Path, Record]]:
    """Each checkpoint on the way back to the dense one, what it was made from, and its record; without such a way the
    checkpoint itself and an empty record."""
    folders, records = zip(*_way_back(folder), strict=True)
    digest = identify(dense)["sha256"]
    made_from = [contents(record.get("inputs")).get("parent") for record in records]
    if digest not in made_from:
        return [(folder, dense, {})]
    count = made_from.index(digest) + 1
    return list(zip(folders[:count], [*folders[1:count], dense], records[:count], strict=True))


def _way_back(folder: Path) -> list[tuple[Path, Record]]:
    """A checkpoint, what it was made from, what that was made from and so on, each with its record."""
    stage = read_stage(folder) or {}
    return [(folder, stage), *((ancestor.path, ancestor.record) for ancestor in ancestors(stage))]


def pruned_shares(model: PreTrainedModel, folder: Path, dense: Path, flag: str) -> list[float]:
    """Of each layer of a model the share of its parameters in the dense one that is gone.

    Args:
        model: of the checkpoint `folder`. folder, dense, flag: see `kept_layers`.
    """
    original, _ = load_skeleton(dense, torch.float32)
    before = [parts.parameters for parts in layers_of(original)]
    places = kept_layers(folder, dense, flag)
    return [1 - parts.parameters / max(before[place], 1) for parts, place in zip(layers_of(model), places, strict=True)]
