"""Importance of a language model's structures and removal analysis, against the plain way of computing them."""

import copy

import pytest
import torch
from conftest import DECODERS, LAYOUTS, VARIANTS, tiny_decoder

from compression.config import parse
from compression.importance import removal_costs
from compression.llm.perplexity import perplexity
from compression.llm.removal import removal_perplexities
from compression.llm.score_passes import score_structures
from compression.llm.scoring import SCORES, Score, register, scores_markdown
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of
from compression.surgery import shrink_decoder
from run_global_pruning import GlobalPruningConfig


@pytest.fixture
def windows():
    return torch.randint(3, 120, (3, 12), generator=torch.Generator().manual_seed(2))


# Fused projections, norms on both sides of attention and MLP, norms over all heads together, multiplied branches.
OTHERS = {family: (family, {}) for family in ("phi3", "olmo2", "granite")}
MODELS = {family: (family, {}) for family in DECODERS} | LAYOUTS | OTHERS | {"gemma2": VARIANTS["gemma2, biases"]}


@pytest.fixture(params=sorted(MODELS))
def model(request):
    family, fields = MODELS[request.param]
    return tiny_decoder(family, **fields)


def plain_loss(model, ids):
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def rows_of(parts, kind, index):
    """(matrix, slice of its rows) that belong to one structure."""
    for rows in parts.split(kind)[0]:
        start = 0
        for share in rows.shares:
            size = share // parts.count(kind)
            yield rows.module, slice(start + index * size, start + (index + 1) * size)
            start += share


def columns_of(parts, kind, index):
    outer = parts.split(kind)[1]
    size = outer.in_features // parts.count(kind)
    return outer, slice(index * size, (index + 1) * size)


def test_perplexity_is_that_of_the_usual_loss(model, windows):
    total = sum(plain_loss(model, ids[None]).item() for ids in windows) / len(windows)
    assert perplexity(model, windows, batch_size=2) == pytest.approx(torch.tensor(total).exp().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["taylor", "taylor_2nd"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_taylor_scores_are_those_of_kept_gradients(model, windows, method, checkpointing):
    scores = score_structures(model, windows, method, batch_size=2, gradient_checkpointing=checkpointing)
    expected = {kind: [torch.zeros(parts.count(kind)) for parts in layers_of(model)] for kind in DECODER_KINDS}
    for ids in windows.split(2):
        model.zero_grad()
        plain_loss(model, ids).backward()
        for kind in DECODER_KINDS:
            for parts, total in zip(layers_of(model), expected[kind], strict=True):
                for index in range(len(total)):
                    pieces = [
                        (linear.weight[rows], linear.weight.grad[rows]) for linear, rows in rows_of(parts, kind, index)
                    ]
                    outer, columns = columns_of(parts, kind, index)
                    pieces.append((outer.weight[:, columns], outer.weight.grad[:, columns]))
                    for weight, gradient in pieces:
                        product = (weight * gradient).abs()
                        total[index] += (
                            product + (0.5 * product**2 if method == "taylor_2nd" else 0)
                        ).sum().detach() / 2
    for kind in DECODER_KINDS:
        for found, wanted in zip(scores[kind], expected[kind], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fisher_scores_are_squared_derivatives_of_gates(model, windows, checkpointing):
    """A gate of its own for every token, multiplied onto the input of the output projection."""
    scores = score_structures(model, windows, "fisher", gradient_checkpointing=checkpointing)
    gates, handles = {}, []
    for kind in DECODER_KINDS:
        for index, parts in enumerate(layers_of(model)):
            outer, count = parts.split(kind)[1], parts.count(kind)
            gate = gates[kind, index] = torch.ones(*windows.shape, count, requires_grad=True)
            scale = lambda _, x, gate=gate, count=count: x[0] * gate.repeat_interleave(x[0].shape[-1] // count, -1)  # noqa: E731
            handles.append(outer.register_forward_pre_hook(scale))
    (plain_loss(model, windows) * windows[:, 1:].numel()).backward()
    for handle in handles:
        handle.remove()
    for (kind, index), gate in gates.items():
        expected = gate.grad.square().mean((0, 1))
        torch.testing.assert_close(scores[kind][index], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_obs_scores_come_from_inputs_and_output_gradients(model, windows, checkpointing):
    scores = score_structures(model, windows, "obs", batch_size=2, gradient_checkpointing=checkpointing)
    seen, handles = {}, []
    for kind in DECODER_KINDS:
        for index, parts in enumerate(layers_of(model)):

            def note(_, x, y, key=(kind, index)):
                y.retain_grad()
                seen[key] = x[0].detach().flatten(0, 1), y

            handles.append(parts.split(kind)[1].register_forward_hook(note))
    (plain_loss(model, windows) * windows[:, 1:].numel()).backward()
    for handle in handles:
        handle.remove()
    for (kind, index), (x, y) in seen.items():
        g, parts = y.grad.flatten(0, 1), layers_of(model)[index]
        weight = parts.split(kind)[1].weight.detach()
        expected = removal_costs(weight, x.T @ x / windows.numel(), g.T @ g / windows.numel(), parts.count(kind))
        torch.testing.assert_close(scores[kind][index], expected, rtol=1e-2, atol=1e-8)


def test_wanda_scores_weigh_with_input_norms(model, windows):
    inputs = {}

    def note(linear, x):
        inputs[linear] = x[0].detach().flatten(0, -2)

    handles = [linear.register_forward_pre_hook(note) for parts in layers_of(model) for linear in parts.linears()]
    model(windows)
    for handle in handles:
        handle.remove()
    scores = score_structures(model, windows, "wanda")
    parts = layers_of(model)[2]
    for kind, index in ((GROUPS, 1), (CHANNELS, 5)):
        outer, columns = columns_of(parts, kind, index)
        expected = (outer.weight.abs() * inputs[outer].norm(dim=0))[:, columns].sum()
        for linear, rows in rows_of(parts, kind, index):
            expected = expected + (linear.weight.abs() * inputs[linear].norm(dim=0))[rows].sum()
        torch.testing.assert_close(scores[kind][2][index], expected)


@pytest.mark.parametrize("method", SCORES)
def test_scoring_leaves_the_model_as_it_was(windows, method):
    model = tiny_decoder()
    before = copy.deepcopy(model)
    score_structures(model, windows, method, gradient_checkpointing=True)
    for (name, found), wanted in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(found, wanted) and found.requires_grad and found.grad is None, name
    assert not model.training
    assert torch.equal(model(windows).logits, before(windows).logits)


def test_bf16_weights_give_fp32_scores(windows):
    model = tiny_decoder()
    expected = score_structures(model, windows, "fisher")
    found = score_structures(model.bfloat16(), windows, "fisher")
    for kind in DECODER_KINDS:
        for one, other in zip(found[kind], expected[kind], strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0.5, atol=1e-3 * other.max().item())


@torch.no_grad()
def test_removal_analysis_equals_the_plain_way(model, windows):
    found = removal_perplexities(model, windows, batch_size=2)
    assert found["dense"] == pytest.approx(perplexity(model, windows), rel=1e-5)
    counts = [(parts.groups, parts.channels) for parts in layers_of(model)]
    for index in range(len(counts)):
        for name, gone in (("layer", DECODER_KINDS), ("attention", (GROUPS,)), ("mlp", (CHANNELS,))):
            kept = {
                kind: [
                    torch.full((counts[layer][place],), not (layer == index and kind in gone))
                    for layer in range(len(counts))
                ]
                for place, kind in enumerate(DECODER_KINDS)
            }
            small = shrink_decoder(copy.deepcopy(model), kept)
            assert found[name][index] == pytest.approx(perplexity(small, windows), rel=1e-4), (name, index)


def test_help_and_documentation_name_every_score(capsys):
    with pytest.raises(SystemExit):
        parse(GlobalPruningConfig, ["--help"])
    shown = "".join(character for character in capsys.readouterr().out if character not in "│\n ")
    assert "{" + ",".join(SCORES) + "}" in shown
    for name, score in SCORES.items():
        assert f"{name}:{score.help}".replace(" ", "") in shown
        assert f"| `{name}` | " in scores_markdown()
    with pytest.raises(SystemExit):
        parse(GlobalPruningConfig, ["--importance_method", "nope"])
    refusal = "".join(capsys.readouterr())
    assert all(name in refusal for name in SCORES)


def test_a_new_score_is_one_class(windows, monkeypatch):
    class Ones(Score):
        name, help, needs_text = "ones", "1", False

        def finish(self, batches, tokens):
            for matrix in self.output_projections:
                matrix.scores.fill_(1)

    monkeypatch.setitem(SCORES, "ones", Ones)  # gone again behind this test
    register(Ones)
    scores = score_structures(tiny_decoder(), windows, "ones")
    assert all((score == 1).all() for kind in DECODER_KINDS for score in scores[kind])
    assert "| `ones` | 1 | weights | as it is |" in scores_markdown()


def test_a_pruned_model_can_be_scored_again(windows):
    model = shrink_decoder(
        tiny_decoder(),
        {
            GROUPS: [torch.tensor(row).bool() for row in ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0])],
            CHANNELS: [torch.ones(48).bool(), torch.arange(48) < 8, torch.zeros(48).bool(), torch.ones(48).bool()],
        },
    )
    for method in SCORES:
        scores = score_structures(model, windows, method)
        assert [len(score) for score in scores[GROUPS]] == [3, 0, 4, 1]
        assert [len(score) for score in scores[CHANNELS]] == [48, 8, 0, 48]
        assert all((score > 0).all() for kind in DECODER_KINDS for score in scores[kind])
    assert len(removal_perplexities(model, windows)["layer"]) == 4


def test_checkpointing_draws_no_dropout(windows):
    model = tiny_decoder(attention_dropout=0.5)
    plain = score_structures(model, windows, "fisher")
    recomputed = score_structures(model, windows, "fisher", gradient_checkpointing=True)
    for kind in DECODER_KINDS:
        for one, other in zip(plain[kind], recomputed[kind], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    assert not any(module.training for module in model.modules())
