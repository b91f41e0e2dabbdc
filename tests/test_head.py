"""The loss in blocks of tokens is the plain one, and no more logits than a block's are ever there."""

import pytest
import torch
from conftest import VOCABULARY, letters, save_decoder, tiny_decoder
from test_lora import pruned
from test_post_training import ALPACA, settings

from compression.batching import TrainingData
from compression.checkpoint import load_language_model
from compression.decoder import decoder_of
from compression.distillation import distillation_loss, largest_label_losses, soft_label_losses
from compression.llm.head import TRAINED_ROWS, in_blocks
from compression.llm.lora import add_lora
from compression.llm.recovery import LanguageModelling
from compression.llm.rows import of_instructions, of_windows
from compression.llm.teacher import LiveTeacher
from compression.structures import family_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("head")
    save_decoder(folder / "pruned", pruned())
    (folder / "text.txt").write_text(letters(100))
    return folder


def test_blocks_have_the_same_result_and_gradients_and_are_not_kept():
    weight = torch.randn(7, 5, requires_grad=True)
    rows, seen = torch.randn(300, 5, requires_grad=True), []

    def squares(block):
        seen.append(len(block))
        return (block @ weight.T).square().sum(-1)

    found = in_blocks(squares, rows)
    assert seen == [128, 128, 44]
    gradients = torch.autograd.grad(found.mean(), [rows, weight])
    assert sorted(seen) == sorted([128, 128, 44] * 2), "computed again in the backward pass"
    expected = (rows @ weight.T).square().sum(-1)
    torch.testing.assert_close(found, expected)
    for gradient, value in zip(gradients, torch.autograd.grad(expected.mean(), [rows, weight]), strict=True):
        torch.testing.assert_close(gradient, value)
    assert in_blocks(squares, rows[:0]).shape == (0,)


def plain_terms(model, teacher, batch):
    """Of whole logits."""

    def logits(of):
        output = of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return output.logits[:, :-1][batch["targets"][:, 1:]]

    with torch.no_grad():
        target = logits(teacher)
    return distillation_loss(logits(model), target, batch["input_ids"][batch["targets"]], 2.0, 0.7)


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
@pytest.mark.parametrize("rows", ["windows", "instructions"])
def test_loss_and_gradients_are_those_of_whole_logits(folder, kind, rows):
    model = pruned() if kind == "tied" else tiny_decoder("qwen2", max_position_embeddings=128)
    if kind == "lora":
        add_lora(model, 4, 8.0, 0.0, family_of(model).projections)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    train: TrainingData = of_windows(torch.randint(4, 30, (3, 100), generator=torch.Generator().manual_seed(0)))
    if rows == "instructions":
        train = of_instructions(load_language_model(folder / "pruned")[1], ALPACA, 128, train_on_inputs=True)
    batch = train.collate(list(range(len(train))), 0)
    assert batch["targets"].sum() > TRAINED_ROWS
    teacher = tiny_decoder(seed=1, max_position_embeddings=128)
    expected = plain_terms(model, teacher, batch)
    expected["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    model.zero_grad()

    recipe = LanguageModelling(settings(folder, kd_weight=0.7), len(train), LiveTeacher(teacher, 2.0))
    found = recipe.loss(recipe.module(model), batch, 0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    found["loss"].backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


def test_no_more_logits_than_a_block_of_tokens_has(folder):
    model, teacher = pruned(), tiny_decoder(seed=1, max_position_embeddings=128)
    seen = []
    for head in (model.lm_head, teacher.lm_head):
        head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[0]))
    batch = of_windows(torch.randint(4, 30, (3, 100))).collate([0, 1, 2], 0)
    recipe = LanguageModelling(settings(folder, kd_weight=0.7), 3, LiveTeacher(teacher, 2.0))
    module = recipe.module(model)
    decoder_of(teacher)
    seen.clear()
    recipe.loss(module, batch, 0)["loss"].backward()
    assert max(seen) == TRAINED_ROWS and len(seen) == 2 * 2 * 2


def test_divergence_of_the_largest_probabilities():
    student, teacher = torch.randn(2, 40, VOCABULARY, generator=torch.Generator().manual_seed(0)).unbind()
    student.requires_grad_()
    exact = soft_label_losses(student, teacher, 2.0)
    logs = (teacher / 2).log_softmax(-1)
    bounds = [largest_label_losses(student, *logs.topk(k), 2.0) for k in (1, 8, VOCABULARY - 1, VOCABULARY)]
    for lower, higher in zip(bounds, [*bounds[1:], exact], strict=True):
        assert (lower <= higher + 1e-5).all()
    torch.testing.assert_close(bounds[-1], exact, atol=1e-5, rtol=1e-5)
    slopes = [torch.autograd.grad(value.sum(), student)[0] for value in (bounds[-1], exact)]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)
    (slope,) = torch.autograd.grad(bounds[0].sum(), student)
    assert slope.isfinite().all()
