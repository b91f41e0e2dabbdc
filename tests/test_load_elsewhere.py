"""Checkpoints in a process that knows nothing of this project: tokenizers ask nothing, old libraries are named."""

from pathlib import Path

import pytest
import torch
from conftest import KEPT, save_decoder, tiny_bert, tiny_decoder, tiny_distilbert
from scripts import run_elsewhere

from compression import modeling
from compression.checkpoint import save_checkpoint
from compression.structures import HEADS, NEURONS
from compression.surgery import shrink, shrink_decoder

AUTO = {"bert": "SequenceClassification", "distilbert": "SequenceClassification", "decoder": "CausalLM"}


@pytest.fixture(params=sorted(AUTO))
def kind(request):
    return request.param


@pytest.fixture
def checkpoint(kind, tokenizer, tmp_path):
    """A pruned model of the kind."""
    folder = tmp_path / "checkpoint"
    if kind == "decoder":
        heads, neurons = torch.tensor([1, 0, 1, 1]).bool(), torch.arange(48)
        kept = {HEADS: [heads] * 4, NEURONS: [neurons < size for size in (4, 8, 8, 48)]}
        return save_decoder(folder, shrink_decoder(tiny_decoder(), kept))
    model = {"bert": tiny_bert, "distilbert": tiny_distilbert}[kind]()
    return save_checkpoint(folder, shrink(model, KEPT), tokenizer, {"stage": "pruning"})


def elsewhere(program, folder, tmp_path):
    """What a process says that starts in an empty folder and finds no project."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return run_elsewhere(program, empty, folder)


def test_model_and_tokenizer_load_without_a_question_or_a_warning(kind, checkpoint, tmp_path):
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
    result = elsewhere(program, checkpoint, tmp_path)
    assert (result.status, result.stdout, result.stderr) == (0, "['a', 'b', 'c']\n", "")


def test_a_transformers_that_is_too_old_is_named(kind, checkpoint, tmp_path):
    version = "5.9.0.dev0"
    program = (
        "import sys, transformers\n"
        f"transformers.__version__ = '{version}'\n"
        f"Model = transformers.AutoModelFor{AUTO[kind]}\n"
        "Model.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    result = elsewhere(program, checkpoint, tmp_path)
    line = f"pruned_{kind}.py needs transformers 5.14 or newer, found {version}: pip install -U transformers"
    assert result.status and result.stderr.splitlines()[-1] == f"ImportError: {line}"


@pytest.mark.parametrize("file", ["pruned_bert", "pruned_distilbert", "pruned_decoder"])
def test_the_check_comes_before_what_old_versions_lack(file):
    source = Path(getattr(modeling, file).__file__).read_text(encoding="utf-8")
    assert source.index("raise ImportError") < source.index("from transformers")
