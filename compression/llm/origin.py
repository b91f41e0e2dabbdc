"""Which layer of the dense model each layer of a pruned one was, by the records, and how much of it went."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compression.checkpoint import load_skeleton
from compression.files import read_object
from compression.lineage import Record, ancestors, as_object
from compression.runtime import UserError
from compression.stage_record import contents, identify, read_stage
from compression.structures import layers_of

KEPT_LAYERS = "kept_layers"
"""Among the metrics of a pruned checkpoint: of each of its layers, its place in the model that it was made from."""


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
    stage, digest = read_stage(folder) or {}, identify(dense)["sha256"]
    folders, records = [folder], [stage]
    for ancestor in ancestors(stage):
        folders.append(ancestor.path)
        records.append(ancestor.record)
    made_from = [contents(record.get("inputs")).get("parent") for record in records]
    if digest not in made_from:
        return [(folder, dense, {})]
    count = made_from.index(digest) + 1
    return list(zip(folders[:count], [*folders[1:count], dense], records[:count], strict=True))


def pruned_shares(model: PreTrainedModel, folder: Path, dense: Path, flag: str) -> list[float]:
    """Of each layer of a model the share of its parameters in the dense one that is gone.

    Args:
        model: of the checkpoint `folder`. folder, dense, flag: see `kept_layers`.
    """
    original, _ = load_skeleton(dense, torch.float32)
    before = [parts.parameters for parts in layers_of(original)]
    places = kept_layers(folder, dense, flag)
    return [1 - parts.parameters / max(before[place], 1) for parts, place in zip(layers_of(model), places, strict=True)]
