"""A student that starts from layers of its teacher, in every family of encoders and through stage 2's command line."""

import copy
from operator import attrgetter

import pytest
import torch
from conftest import KEPT, MODELS, WORDS, load_script, tiny_bert
from scripts import run_killed, run_script

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.student import chosen_layers
from compression.quantization import Format, pack
from compression.runtime import UserError
from compression.stage_record import read_stage
from compression.structures import family_of
from compression.student_init import with_layers
from compression.surgery import shrink

DISTIL = "2_distill_student.py"


def layers_in(model):
    return attrgetter(family_of(model).layers)(model)


def without_layer_1(model):
    """A copy of the three-layer model whose middle layer was taken out by hand."""
    cut = copy.deepcopy(model)
    del layers_in(cut)[1]
    cut.config.num_hidden_layers = 2
    return cut


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_a_student_of_all_layers_is_the_teacher(tiny_model, batch):
    assert torch.equal(logits(with_layers(tiny_model, range(3)), batch), logits(tiny_model, batch))


def test_a_student_of_some_layers_is_the_teacher_without_the_others(tiny_model, batch):
    before = copy.deepcopy(tiny_model.state_dict())
    student = with_layers(tiny_model, (0, 2))
    found, expected = logits(student, batch), logits(without_layer_1(tiny_model), batch)
    assert torch.equal(found, expected) and not torch.equal(found, logits(tiny_model, batch))
    for parameter in student.parameters():  # shares no memory
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert tiny_model.config.num_hidden_layers == 3


def test_a_student_is_saved_and_loaded_as_it_is(tiny_model, batch, tokenizer, tmp_path):
    student = with_layers(tiny_model, (0, 2))
    loaded, _ = load_classifier(save_checkpoint(tmp_path / "model", student, tokenizer, {"stage": "student"}))
    assert type(loaded) is type(tiny_model) and loaded.config.num_hidden_layers == len(layers_in(loaded)) == 2
    assert torch.equal(logits(loaded, batch), logits(student, batch))


def test_what_differs_between_layers_goes_with_them():
    """As in ModernBERT, where layers attend to different places."""
    model = tiny_bert()
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert with_layers(model, (1, 2)).config.layer_types == ["sliding_attention", "full_attention"]


def test_a_first_layer_of_its_own_kind_has_to_stay_the_first():
    """As in ModernBERT, whose first layer has no norm before its attention."""
    model = tiny_bert()
    layers_in(model)[1].norm = torch.nn.LayerNorm(32)
    with pytest.raises(
        UserError, match=r"--student_layers 1,2: the first layer of bert .*\.0\.norm\.bias.*begin with 0"
    ):
        with_layers(model, (1, 2))


@pytest.mark.parametrize("layers", [(), (0, 3), (-1,)])
def test_layers_that_are_not_there_are_an_error(layers):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        with_layers(tiny_bert(), layers)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("3", 6, (0, 2, 4)),
        ("6", 12, (0, 2, 4, 6, 8, 10)),
        ("4", 12, (0, 3, 6, 9)),
        ("5", 12, (0, 2, 4, 7, 9)),
        ("1", 12, (0,)),
        ("6", 6, (0, 1, 2, 3, 4, 5)),
        ("0,2,4,7,9,11", 12, (0, 2, 4, 7, 9, 11)),
        ("1,2", 3, (1, 2)),
    ],
)
def test_a_number_means_evenly_spaced_layers_and_a_list_means_these(text, count, expected):
    assert chosen_layers(text, count) == expected


# Stage 2.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Texts of letters, of two classes."""
    folder = tmp_path_factory.mktemp("data")
    rows = [f"{letter} a b{' c' * (index % 9)}\t{index % 2}" for index, letter in enumerate(WORDS * 2)]
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture
def distil(data_dir, tokenizer, tmp_path):
    """Stage 2 with a teacher: `distil(model)` gives its command line, for more flags to follow."""

    def prepare(model):
        save_checkpoint(tmp_path / "teacher_model", model, tokenizer, {"stage": "teacher"})
        places = ["--models_dir", tmp_path, "--data_dir", data_dir]
        return [DISTIL, *places, "--num_epochs", 1, "--batch_size", 8, "--max_length", 16]

    return prepare


@pytest.mark.parametrize("family", sorted(MODELS))
def test_stage_2_starts_from_the_teacher_with_its_head_and_tokenizer(distil, tmp_path, batch, family):
    command = [*distil(MODELS[family]()), "--learning_rate", 0]  # what it starts from is what it saves
    run_script(*command, "--student_layers", "0,2")
    student, tokenizer = load_classifier(tmp_path / "student_model")
    teacher, teachers = load_classifier(tmp_path / "teacher_model")
    assert torch.equal(logits(student, batch), logits(without_layer_1(teacher), batch))
    assert tokenizer.get_vocab() == teachers.get_vocab()


def test_the_record_says_what_it_was_made_from_and_is_compared(distil, tmp_path):
    command, output = distil(tiny_bert()), tmp_path / "student_model"
    assert "The student starts from the teacher's layers 0, 1\n" in run_script(*command, "--student_layers", 2).stdout
    stage = read_stage(output)
    assert stage["parent"] == str(tmp_path / "teacher_model") and stage["config"]["student_layers"] == "2"
    assert stage["inputs"]["parent"] == stage["inputs"]["teacher"]
    again = [*command, "--skip_existing", "--student_layers"]
    assert "skipped" in run_script(*again, 2).stdout
    refused = run_script(*again, "0,2", expect=2).stderr
    assert "student_model" in refused and "--overwrite" in refused and read_stage(output) == stage
    run_script(*again, "0,2", "--overwrite")
    assert read_stage(output)["config"]["student_layers"] == "0,2"


def test_a_killed_run_goes_on_to_the_undisturbed_result(distil, tmp_path):
    command = [*distil(tiny_bert()), "--student_layers", 2, "--save_steps", 1, "--resume"]
    run_script(*command)
    weights = tmp_path / "student_model" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    (tmp_path / "student_model").rename(tmp_path / "before")
    run_killed(*command, at="compression.training.seed_step", call=4)
    assert "Resumed at epoch" in run_script(*command).stdout and weights.read_bytes() == expected


ALLOWED = "allowed is how many layers (3), or layers from 0 on, each once and in their order (0,2,4)"


@pytest.mark.parametrize("layers", ["0", "-1", "three", "", "1.5", "0,1,1", "2,0", "-1,2", "0;2"])
def test_what_names_no_layers_is_refused_before_any_work(layers):
    with pytest.raises(UserError) as error:
        load_script("2_distill_student").DistillationConfig.make(student_layers=layers)
    assert str(error.value) == f"--student_layers {layers}: {ALLOWED}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--student_layers 4", "--student_layers 4: the teacher has 3 layers; allowed is 1 to 3 of them"),
        ("--student_layers 0,3", "--student_layers 0,3: the teacher has 3 layers; allowed is 1 to 3 of them"),
        ("--student_layers 2000000000", "the teacher has 3 layers"),
        ("--student_layers none", f"--student_layers none: {ALLOWED}"),
        ("--student mine --student_layers 2", "--student mine --student_layers 2: the student starts from"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(distil, tmp_path, flags, message):
    command = distil(tiny_bert())
    before = sorted(tmp_path.rglob("*"))
    error = run_script(*command, *flags.split(), expect=2).stderr
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pruned_or_quantized_teacher_is_refused(distil, tmp_path):
    quantized = pack(tiny_bert(), Format(), torch.float32)
    for model, found in ((shrink(tiny_bert(), KEPT), "is pruned"), (quantized, "is quantized already")):
        command = distil(model)
        error = run_script(*command, "--student_layers", 2, expect=2).stderr
        assert error.startswith(f"error: --teacher_path {tmp_path / 'teacher_model'}: {found}")
        assert len(error.splitlines()) == 1 and not (tmp_path / "student_model").exists()


def test_a_teacher_whose_config_cannot_be_read_is_refused(distil, tmp_path):
    command, path = distil(tiny_bert()), tmp_path / "teacher_model" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": "three"'))
    error = run_script(*command, "--student_layers", 2, expect=2).stderr
    assert error.startswith(f"error: {tmp_path / 'teacher_model'}: cannot be loaded") and len(error.splitlines()) == 1
