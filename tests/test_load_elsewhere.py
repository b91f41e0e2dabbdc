"""Checkpoints in a process that knows nothing of this project: tokenizers ask nothing, old libraries are named."""

import json
from pathlib import Path

import pytest
import torch
from conftest import KEPT, MODELS, save_decoder, tiny_decoder
from scripts import run_elsewhere

from compression import modeling
from compression.checkpoint import load_classifier, save_checkpoint
from compression.structures import CHANNELS, GROUPS
from compression.surgery import shrink, shrink_decoder

AUTO = {"bert": "SequenceClassification", "distilbert": "SequenceClassification", "decoder": "CausalLM"}
FILES = {"bert": "pruned_encoder.py", "distilbert": "pruned_encoder.py", "decoder": "pruned_decoder.py"}


@pytest.fixture(params=sorted(AUTO))
def kind(request):
    return request.param


@pytest.fixture
def checkpoint(kind, tokenizer, tmp_path):
    """A pruned model of the kind."""
    folder = tmp_path / "checkpoint"
    if kind == "decoder":
        groups, channels = torch.tensor([1, 0, 1, 1]).bool(), torch.arange(48)
        kept = {GROUPS: [groups] * 4, CHANNELS: [channels < size for size in (4, 8, 8, 48)]}
        return save_decoder(folder, shrink_decoder(tiny_decoder(), kept))
    return save_checkpoint(folder, shrink(MODELS[kind](), KEPT), tokenizer, {"stage": "pruning"})


def elsewhere(program, folder, tmp_path):
    """What a process says that starts in an empty folder and finds no project."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return run_elsewhere(program, empty, folder)


def assert_loads_elsewhere(kind, folder, tmp_path):
    """Model and tokenizer load in another process, which has nothing to ask and nothing to warn of."""
    program = (
        "import sys\n"
        f"from transformers import AutoModelFor{AUTO[kind]} as Model, AutoTokenizer\n"
        "from transformers.utils import logging\n"
        "logging.disable_progress_bar()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model = Model.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model(**tokenizer('a b c', return_tensors='pt'))\n"
        "print(tokenizer.tokenize('a b c'))\n"
    )
    result = elsewhere(program, folder, tmp_path)
    assert (result.status, result.stdout, result.stderr) == (0, "['a', 'b', 'c']\n", "")


def test_model_and_tokenizer_load_without_a_question_or_a_warning(kind, checkpoint, tmp_path):
    assert_loads_elsewhere(kind, checkpoint, tmp_path)


def test_a_transformers_that_is_too_old_is_named(kind, checkpoint, tmp_path):
    version = "5.9.0.dev0"
    program = (
        "import sys, transformers\n"
        f"transformers.__version__ = '{version}'\n"
        f"Model = transformers.AutoModelFor{AUTO[kind]}\n"
        "Model.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    result = elsewhere(program, checkpoint, tmp_path)
    line = f"{FILES[kind]} needs transformers 5.14 or newer, found {version}: pip install -U transformers"
    assert result.status and result.stderr.splitlines()[-1] == f"ImportError: {line}"


@pytest.mark.parametrize(("kind", "name"), [("bert", "PrunedBert"), ("distilbert", "PrunedDistilBert")])
def test_a_checkpoint_that_names_its_familys_own_file_loads_in_the_project(kind, name, checkpoint, batch, tmp_path):
    """As they were written when each family had a file; that file is not even read."""
    before, tokenizer = load_classifier(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    autos = {"Config": "AutoConfig", "Model": "AutoModel"}
    autos["ForSequenceClassification"] = "AutoModelForSequenceClassification"
    assert config["auto_map"] == {auto: f"pruned_encoder.{name}{ending}" for ending, auto in autos.items()}
    config["auto_map"] = {auto: f"pruned_{kind}.{name}{ending}" for ending, auto in autos.items()}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "pruned_encoder.py").unlink()
    (checkpoint / f"pruned_{kind}.py").write_text("raise RuntimeError('code of a checkpoint was run')")
    (checkpoint / "stage.json").unlink()  # it holds the files' checksums

    model, _ = load_classifier(checkpoint)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before(**batch).logits)
    again = save_checkpoint(tmp_path / "again", model, tokenizer, {})
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"] == f"pruned_encoder.{name}Config"
    assert_loads_elsewhere(kind, again, tmp_path)


@pytest.mark.parametrize("file", ["pruned_encoder.py", "pruned_decoder.py"])
def test_the_check_comes_before_what_old_versions_lack(file):
    source = (Path(modeling.__file__).parent / file).read_text(encoding="utf-8")
    assert source.index("raise ImportError") < source.index("from transformers")
