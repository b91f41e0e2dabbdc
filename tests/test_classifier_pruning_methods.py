"""Parts of benchmarks/classifier_pruning_methods.py; the whole of it runs in test_benchmarks.py."""

import json
import sys

import pytest
import torch
from conftest import KEPT, VOCABULARY, tiny_bert
from scripts import ROOT, run_script
from torch.nn.functional import cross_entropy

from compression import importance
from compression.checkpoint import save_checkpoint
from compression.classifier.data import Encoded
from compression.flops import count_macs
from compression.runtime import UserError
from compression.stage_record import describe_stage
from compression.structures import ENCODER_KINDS, HEADS, NEURONS, layers_of
from compression.surgery import shrink

sys.path.append(str(ROOT / "benchmarks"))
from classifier_pruning_methods import ground, kwon, plain, report

LENGTHS = (5, 9, 7, 9, 4, 8, 6, 9)


def load():
    return tiny_bert(max_position_embeddings=128)


@pytest.fixture(scope="module")
def teacher():
    return load()


@pytest.fixture(scope="module")
def base():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = Encoded({"input_ids": ids}, torch.arange(len(ids)) % 2)
    return ground.Ground(load, rows, pad_token_id=0, seed=1)


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("make", [plain.small_scratch, plain.small_layers, plain.uniform_magnitude, kwon.kwon])
def test_models_have_nearly_the_macs_and_no_more(make, share, base, teacher):
    dense = count_macs(teacher, 128).encoder
    small = make(base, int(share * dense))
    neuron = ground.structure_macs(layers_of(teacher)[0], NEURONS) * len(layers_of(small))
    assert share * dense - 2 * neuron < count_macs(small, 128).encoder <= share * dense
    assert all(parts.count(kind) for parts in layers_of(small) for kind in ENCODER_KINDS)
    assert small(torch.ones(2, 5, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("make", [plain.uniform_magnitude, kwon.kwon])
def test_macs_that_are_too_few_for_each_layer_are_refused(make, base, teacher):
    with pytest.raises(UserError, match="too few for a head and a neuron"):
        make(base, count_macs(teacher, 128).encoder // 10)


def test_small_model_from_scratch_has_nothing_of_the_teacher(base, teacher):
    small = plain.small_scratch(base, count_macs(teacher, 128).encoder // 2)
    ours, theirs = (model.base_model.embeddings.word_embeddings.weight for model in (small, teacher))
    assert (ours[1:] != theirs[1:]).all()


def test_gradients_of_rows_sum_to_those_of_the_masks(base, teacher):
    gradients, model = kwon.mask_gradients(base), load()
    for inputs, labels in base.batches(model):
        cross_entropy(model(**inputs).logits, labels, reduction="sum").backward()
    for index, parts in enumerate(layers_of(model)):
        for kind in ENCODER_KINDS:
            outer = parts.split(kind)[1]
            expected = importance.mask_gradient(outer.weight, outer.weight.grad, parts.count(kind))
            assert gradients[kind][index].shape == (len(LENGTHS), parts.count(kind))
            torch.testing.assert_close(gradients[kind][index].sum(0), expected, rtol=1e-3, atol=1e-5)


def test_search_keeps_the_best_split_of_the_budget_between_heads_and_neurons(base, teacher):
    gradients, macs = kwon.mask_gradients(base), int(0.45 * count_macs(teacher, 128).encoder)
    kept = kwon.search(teacher, gradients, macs)
    fisher = {kind: torch.cat([rows.square().mean(0) for rows in gradients[kind]]) for kind in ENCODER_KINDS}
    value = sum(fisher[kind][torch.cat(kept[kind])].sum() for kind in ENCODER_KINDS)
    costs = {kind: ground.structure_macs(layers_of(teacher)[0], kind) for kind in ENCODER_KINDS}
    first = {
        kind: torch.cat([rows.square().mean(0) == rows.square().mean(0).max() for rows in gradients[kind]])
        for kind in ENCODER_KINDS
    }

    def best(kind, count):
        rest = fisher[kind][~first[kind]].topk(count - len(gradients[kind])).values
        return fisher[kind][first[kind]].sum() + rest.sum()

    splits = [(heads, min(144, (macs - heads * costs[HEADS]) // costs[NEURONS])) for heads in range(3, 13)]
    splits = [split for split in splits if split[1] >= 3]
    assert len(splits) > 3
    torch.testing.assert_close(value, max(best(HEADS, heads) + best(NEURONS, neurons) for heads, neurons in splits))


def test_rearranging_finds_structures_whose_losses_cancel():
    one = torch.tensor([1.0, 2.0, -1.0, 0.5])
    # Alone the third costs least, but the first two go for nothing.
    gradients = torch.stack([one, -one, 0.9 * one.roll(1), 0.8 * one.flip(0), 3 * one.roll(2)], dim=1)

    def cost(kept):
        return gradients[:, ~kept].sum(1).square().sum()

    kept = torch.tensor([True, True, False, False, True])
    better = kwon.rearranged(kept, gradients)
    assert better.sum() == 3 and cost(better) < 1e-9 < cost(kept)
    assert kwon.rearranged(torch.ones(5, dtype=torch.bool), gradients).all()


@pytest.mark.parametrize("count", [4, 16])
def test_masks_solve_the_damped_least_squares(count):
    generator = torch.Generator().manual_seed(0)
    outer = torch.nn.Linear(16, 6)
    x, wanted = (torch.randn(40, size, generator=generator) for size in (16, 6))
    sums = kwon.NormalEquations(outer, count)
    for part in range(2):
        sums.add(x[20 * part : 20 * part + 20], wanted[20 * part : 20 * part + 20])
    columns = torch.einsum("tsc,osc->tos", x.view(40, count, -1), outer.weight.detach().view(6, count, -1))
    columns = columns.reshape(-1, count).double()
    rows = torch.cat([columns, torch.eye(count)])
    goal = torch.cat([wanted.flatten() - columns.sum(1), torch.zeros(count)])
    expected = 1 + torch.linalg.lstsq(rows, goal).solution
    torch.testing.assert_close(sums.solve(), expected, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_tuning_changes_no_whole_model_and_mends_a_pruned_one(base, teacher):
    def outputs(model):
        """Behind the first layer, of all tokens that are no padding."""
        found = []
        for inputs, _ in base.batches(model):
            found.append(model(**inputs, output_hidden_states=True).hidden_states[1][inputs["attention_mask"] > 0])
        return torch.cat(found)

    whole = {kind: [torch.ones_like(mask) for mask in KEPT[kind]] for kind in ENCODER_KINDS}
    same, pruned = shrink(teacher, whole), shrink(teacher, KEPT)
    with torch.no_grad():
        dense, before = outputs(teacher), outputs(pruned)
        for model in (same, pruned):
            kwon.tune(model, base)
        torch.testing.assert_close(outputs(same), dense, rtol=1e-3, atol=1e-4)
        assert (outputs(pruned) - dense).square().mean() < (before - dense).square().mean()


def test_errors_are_paired_with_ours_and_over_seeds():
    def row(method, seed, hits):
        right = [int(hit) for hit in hits]
        named = {"method": method, "ratio": 0.8, "seed": seed, "share": 0.2, "parameters": {"total": 2_000_000}}
        return named | {"hits": hits, "accuracy": sum(right) / len(right)}

    rows = [row("ours", 0, "1110"), row("kwon", 0, "1010"), row("ours", 1, "1110"), row("kwon", 1, "1000")]
    failed = {"method": "modelopt", "ratio": 0.8, "seed": 0, "impossible": "no such width"}
    speeds = {"teacher": 10, "kwon_0.8_0": 40}
    found = {"teacher": row("teacher", 0, "1111"), "rows": [*rows, failed], "throughput": speeds}
    ours, other = report.points(found)
    # Of four sentences ours misses one: the standard deviation of (0, 0, 0, 1) is 3^0.5 / 4.
    assert (ours.accuracy, ours.spread, ours.against) == (75, 0, {"teacher": (-25, pytest.approx(25 * 3**0.5 / 2))})
    assert other.accuracy == 37.5 and other.spread == pytest.approx(25 / 2**0.5) and other.speed_up == 4
    # Its mean over seeds less ours is (0, -1, -1/2, 0).
    assert other.against["ours"] == (-37.5, pytest.approx(50 * (0.6875 / 4) ** 0.5))
    assert "- modelopt at 80 %: no such width" in report.table(found)


@pytest.fixture
def command(tmp_path, tokenizer):
    """Runs the benchmark with these flags; gives what it wrote."""
    stage = describe_stage("teacher", {}, {}, {}, {"name": "x"})
    save_checkpoint(tmp_path / "teacher", load(), tokenizer, stage)
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{'abcdefgh'[index % 8]} a b{' c' * (index % 5)}\t{index % 2}" for index in range(24)]
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")

    def run(*flags, expect=0):
        places = ["--teacher_path", tmp_path / "teacher", "--data_dir", tmp_path, "--results_dir", tmp_path / "out"]
        sizes = ["--num_epochs", 1, "--scored_rows", 8, "--throughput_repeats", 1]
        said = run_script("benchmarks/classifier_pruning_methods.py", *places, *sizes, *flags, expect=expect)
        path = tmp_path / "out" / "classifier_pruning_methods.json"
        return said, json.loads(path.read_text()) if path.is_file() else None

    return run


def test_rows_that_are_there_are_not_measured_again(command, tmp_path):
    _, first = command("--ratios", 0.5, "--methods", "kwon")
    said, then = command("--ratios", 0.5, 0.7, "--methods", "kwon")
    assert then["rows"][0] == first["rows"][0] and [row["ratio"] for row in then["rows"]] == [0.5, 0.7]
    assert "50 % of the MACs removed" not in said.stdout
    _, reported = command("--report")
    assert reported == then
    assert all((tmp_path / "out" / f"classifier_pruning_methods.{end}").is_file() for end in ("md", "png"))
    said, same = command("--ratios", 0.5, "--methods", "uniform_magnitude", "--batch_size", 8, expect=2)
    assert "--batch_size 8" in said.stderr and "--output_name" in said.stderr and same == then


def test_what_is_not_installed_is_left_out_in_one_line(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    said, found = command("--ratios", 0.5, "--methods", "torch_pruning", "modelopt", "uniform_magnitude")
    assert "torch_pruning is left out: not installed; pip install --no-deps torch-pruning==1.6.1" in said.stdout
    assert [row["method"] for row in found["rows"]] == ["uniform_magnitude"]


def test_report_of_nothing_is_refused(command):
    said, found = command("--report", expect=2)
    assert "has no rows to report" in said.stderr and found is None
