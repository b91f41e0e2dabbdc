"""The command that makes a checkpoint again, from its record: the script, and every setting that was recorded."""

import shlex

from compression.config import flag_words
from compression.lineage import as_object
from compression.outputs import is_export
from compression.page.records import Checkpoint
from compression.runtime import relative_path

SCRIPTS = {
    "teacher": "1_finetune_teacher.py",
    "student": "2_distill_student.py",
    "student_softlabel": "2_distill_student.py",
    "pruned": "8_pruning_with_finetuning.py",
    "pruned_qkd4bit": "10_qat_kd_4bit.py",
    "global_pruning": "run_global_pruning.py",
    "gqa_pruning": "gqa_aware_pruning.py",
    "recovery": "post_training.py",
    "merged": "merge_and_save_lora.py",
}
"""By the name of the stage; what ends in `quantized` is stage 9's, exports are `export_model.py`'s."""
HOW = ("resume", "skip_existing", "overwrite", "push_to_hub")
"""Settings that say how a run goes, and nothing of what it makes."""


def script_of(stage: str | None) -> str | None:
    """The script that makes what a record calls so; None where that is not known."""
    if stage is None or stage in SCRIPTS:
        return SCRIPTS.get(stage or "")
    if is_export(stage):
        return "export_model.py"
    return "9_quantize_pruned_model.py" if stage.endswith("quantized") else None


def command_of(checkpoint: Checkpoint) -> str | None:
    """The command, with the settings that are not none; None where the script or the settings are not known."""
    script = script_of(checkpoint.stage)
    if script is None or not checkpoint.settings:
        return None
    words = ["python", script]
    for name, value in checkpoint.settings.items():
        if value is not None and name not in HOW:
            words += flag_words(name, value)
    return shlex.join(words)


def made_from(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Role and place of what it was made from."""
    found = [(role, relative_path(path)) for role, path in checkpoint.inputs.items()]
    data = as_object(as_object(checkpoint.record.get("inputs")).get("data")).get("name")
    return [*found, ("data", str(data))] if data else found
