"""A teacher's outputs on a data set, computed once and kept."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from compression.checkpoint import load_tensors, save_tensors
from compression.classifier.data import Encoded
from compression.classifier.metrics import predict
from compression.classifier.tasks import Task
from compression.integrity import digest_of
from compression.outputs import KEPT_LOGITS, kept_folder
from compression.runtime import log
from compression.stage_record import identify

LOGITS = "logits.safetensors"


def teacher_logits(
    model: PreTrainedModel, folder: Path, encoded: Encoded, pad_token_id: int, cache: Path, task: Task
) -> Tensor:
    """The teacher's logits [rows, classes] on a data set, computed once and kept.

    Args:
        folder: where the teacher was loaded from.
        cache: the folder they are kept in, under a hash of the teacher's weights and of the token ids, so that later
            stages and resumed runs read them. Where they are damaged they are computed again.
    """
    key = digest_of(f"{identify(folder)['sha256']} {encoded.digest()}", 16)

    def compute(kept: Path) -> None:
        log.info("Computing the teacher's logits on %d sentences, once", len(encoded))
        save_tensors(kept / LOGITS, {"logits": predict(model, encoded, pad_token_id, task=task)})

    kept = kept_folder(Path(cache) / f"{KEPT_LOGITS}{key}", "teacher_logits", compute)
    return load_tensors(kept / LOGITS)["logits"]
