"""No script deletes or changes a file that it did not write, whatever a flag that names an output points at."""

import shutil
from pathlib import Path

import pytest
from conftest import load_script, save_decoder, tiny_bert, tiny_distilbert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_lora import pruned, with_adapter

from compression.checkpoint import save_checkpoint, save_folder
from compression.integrity import seal
from compression.llm.lora import write_adapter
from compression.outputs import Output, check_place
from compression.runtime import MODELS, RESULTS, ROOT, UserError
from compression.stage_record import describe_stage

SENTENCES = [f"{letter} a b{' c' * index}\t{index % 2}" for index, letter in enumerate("abcdefghijklmnopqrst")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def drawn_in_no_time(monkeypatch):
    """Figures are files here, whatever is on them."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: Path(file).write_bytes(b"figure"))


@pytest.fixture(scope="module", name="world")
def inputs_of_every_script(tmp_path_factory, tokenizer):
    """What every script finds its inputs in; read only."""
    world = tmp_path_factory.mktemp("world")
    (world / "data").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (world / "data" / name).write_text("\n".join(["sentence\tlabel", *SENTENCES]) + "\n")
    for stage, model in (("teacher", tiny_bert()), ("student", tiny_distilbert()), ("pruned", tiny_distilbert())):
        save_checkpoint(
            world / "models" / f"{stage}_model", model, tokenizer, describe_stage(stage, {}, {}, {}, {"name": "x"})
        )
    save_decoder(world / "dense", pruned())
    save_folder(world / "adapter", lambda folder: write_adapter(with_adapter(pruned()), folder), {"stage": "recovery"})
    return world


# Script, flag that names the output; the folder it writes, given the flag's value; further flags.
OUTPUTS = {
    "teacher": ("1_finetune_teacher.py", "models_dir", "teacher_model"),
    "student": ("2_distill_student.py", "models_dir", "student_model"),
    "soft labels": ("2_distill_student.py", "models_dir", "student_softlabel_model"),
    "quantized, default": ("9_quantize_pruned_model.py", "models_dir", "pruned_quantized_final"),
    "quantized": ("9_quantize_pruned_model.py", "output_dir", "."),
    "export": ("export_model.py", "output_dir", "."),
    "report": ("7_evaluate_and_generate_report.py", "output_dir", "."),
    "comparison": ("evaluate_plot.py", "output_dir", "."),
    "downloaded": ("download_model.py", "models_dir", "bert-local"),
    "global pruning": ("run_global_pruning.py", "results_dir", "mine"),
    "gqa pruning": ("gqa_aware_pruning.py", "results_dir", "mine"),
    "recovery": ("post_training.py", "results_dir", "mine"),
    "recovery, elsewhere": ("post_training.py", "output_dir", "."),
    "merged": ("merge_and_save_lora.py", "output_dir", "."),
    "own text": ("generate_text.py", "results_dir", "mine"),
    "adapters evaluated": ("evaluate_lora_model.py", "output_file", "figures.json"),
}
KINDS = {
    case: case.replace(" ", "_")
    for case in ("teacher", "student", "global pruning", "gqa pruning", "merged", "own text")
}
KINDS |= {"soft labels": "student_softlabel", "recovery": "recovery", "recovery, elsewhere": "recovery"}
KINDS |= {"quantized, default": "pruned_quantized", "quantized": "pruned_quantized", "export": "pruned_onnx"}


def config_of(case, world, target):
    """The script and a configuration of it that writes into `target`."""
    name, flag, _ = OUTPUTS[case]
    script = load_script(name.removesuffix(".py"))
    own = (found for found in vars(script).values() if isinstance(found, type) and found.__module__ == script.__name__)
    (config_class,) = (found for found in own if found.__name__.endswith("Config"))
    models, text = world / "models", str(world / "data" / "train.tsv")
    teacher, student, dense = models / "teacher_model", models / "student_model", world / "dense"
    known = dict(data_dir=str(world / "data"), models_dir=models, teacher=str(teacher), student=str(student))
    known |= dict(teacher_path=teacher, pruned_model_path=models / "pruned_model", base_model=str(dense))
    known |= dict(pruned_model=dense, lora_dir=world / "adapter", dataset=text, eval_ppl_datasets=text)
    known |= dict.fromkeys(("max_length", "sequence_length", "flops_sequence_length", "latency_sequence_length"), 16)
    known |= dict.fromkeys(("latency_repeats", "throughput_repeats", "inference_runs", "load_runs"), 2)
    known |= dict(throughput_batch_size=2, output_name="mine", overwrite=True, embedded=True, agreement_text="none")
    if name == "post_training.py":
        known["teacher"] = None
    if name == "generate_text.py":
        known |= dict(tokens=32, length=16, batch_size=2)
    if case == "soft labels":
        known["variant"] = "soft_labels"
    if "validation_fraction" in config_class().as_dict():
        known["dataset"] = "sst2"
    fields = {key: value for key, value in known.items() if key in config_class().as_dict()}
    fields[flag] = target / "figures.json" if flag == "output_file" else target
    return script, config_class.make(**fields)


def run(case, world, target):
    """Run the script, which may refuse or succeed, but not fail otherwise."""
    script, config = config_of(case, world, target)
    try:
        script.main(config)
    except UserError as error:
        return str(error)
    return None


NAMES = "thesis.txt sub/notes.md .hidden .git/HEAD config.json model.safetensors models/model.safetensors stage.json "
NAMES += "source.json run.json adapter_model.safetensors final_report.json final_report.md model_comparison.csv "
FILE_NAMES = st.sampled_from([*NAMES.split(), "figures.json"])
VALUES = st.sampled_from([b"", b"mine", b"{}", b"[]", b'{"stage": "teacher"}'])
USER_FILES = st.dictionaries(FILE_NAMES, VALUES, min_size=1)


@pytest.mark.parametrize("case", sorted(OUTPUTS))
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(users=USER_FILES, earlier=st.booleans())
def test_a_users_files_stay(case, world, tmp_path, users, earlier):
    target = tmp_path / "target"
    shutil.rmtree(target, ignore_errors=True)
    folder = target / OUTPUTS[case][2] if OUTPUTS[case][1] != "output_file" else target
    folder.mkdir(parents=True)
    if earlier and case in KINDS:  # a real result, and then a file of the user's
        (folder / "result.bin").write_bytes(b"ours")
        record = "run.json" if case.endswith(("pruning", "text")) else "stage.json"
        seal(folder, {"stage": KINDS[case], "config": {}, "inputs": {}}, record)
    for name, value in users.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)
    before = contents(target)
    run(case, world, target)
    after = contents(target)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("case", sorted(KINDS))
def test_a_folder_of_another_kind_a_file_and_shared_folders_are_refused(case, world, tmp_path):
    name, flag, inside = OUTPUTS[case]
    target = tmp_path / "target"
    folder = target / inside
    folder.mkdir(parents=True)
    (folder / "result.bin").write_bytes(b"ours")
    seal(folder, {"stage": "another", "config": {}, "inputs": {}}, "stage.json")
    before = contents(tmp_path)
    assert run(case, world, target) is not None and contents(tmp_path) == before
    shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file")
    assert "is a file" in run(case, world, target) and folder.read_text() == "a file"


def test_places_that_hold_more_than_a_result(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for place in ("/", home, home.parent, ROOT, ROOT.parent, MODELS, RESULTS, tmp_path, "~"):
        with pytest.raises(UserError, match=r"--output_dir .*: (is|contains) "):
            check_place(Path(place), "--output_dir")
    check_place(home / "new", "--output_dir")


def test_inputs_are_no_outputs(world, tmp_path):
    pruned_model, models = world / "models" / "pruned_model", world / "models"
    before = contents(world)
    for target, found in (
        (pruned_model, "is an input"),
        (models, "contains an input"),
        (pruned_model / "new" / "one", "lies inside an input"),
        (tmp_path / "link", "is an input"),
    ):
        (tmp_path / "link").is_symlink() or (tmp_path / "link").symlink_to(pruned_model)
        assert found in run("quantized", world, target)
    for case, folder in (("merged", "adapter"), ("merged", "dense"), ("recovery, elsewhere", "dense")):
        assert "is an input" in run(case, world, world / folder)
    assert contents(world) == before


def test_a_result_with_other_settings_is_kept_unless_asked(world, tmp_path):
    script, config = config_of("quantized", world, tmp_path / "out")
    config = config.updated(overwrite=False)
    script.main(config)
    first = contents(tmp_path)
    script.main(config)  # the same again
    config = config.updated(blocksize=128)
    with pytest.raises(UserError, match="--output_dir .* other settings or inputs.*--overwrite"):
        script.main(config)
    assert contents(tmp_path)["out/model.safetensors"] == first["out/model.safetensors"]
    script.main(config.updated(overwrite=True))
    assert contents(tmp_path)["out/model.safetensors"] != first["out/model.safetensors"]


def test_a_file_that_appears_while_a_run_goes_on_is_kept_and_so_is_the_result(tmp_path):
    output = Output(tmp_path / "out", "--output_dir", "pruned")
    with output.written() as folder:
        (folder / "weights").write_text("first")
        seal(folder, {"stage": "pruned"})
    with pytest.raises(UserError, match=r"thesis.txt.*the result of this run is in (.*)") as error:
        with output.written() as folder:
            (folder / "weights").write_text("second")
            (tmp_path / "out" / "thesis.txt").write_text("mine")
    elsewhere = Path(str(error.value).rpartition(" ")[2])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "out" / "weights").read_text() == "first" and (elsewhere / "weights").read_text() == "second"


def test_an_edited_report_is_kept(world, tmp_path):
    assert run("report", world, tmp_path) is None
    assert run("report", world, tmp_path) is None, "an earlier report is replaced"
    (tmp_path / "final_report.md").write_text("what I make of it")
    before = contents(tmp_path)
    assert "final_report.md" in run("report", world, tmp_path)
    assert contents(tmp_path) == before
