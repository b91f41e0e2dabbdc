"""Metrics against values worked out by hand, the order of predictions, and how models are timed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, letters_tokenizer, tiny_bert, tiny_decoder
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from compression import timing as efficiency
from compression.batching import batches
from compression.classifier.data import Encoded, Split, encode
from compression.classifier.metrics import (
    LISTED_DISAGREEMENTS,
    classification_metrics,
    describe_task,
    disagreements,
    paired_difference,
    predict,
    score,
)
from compression.classifier.tasks import METRICS, SST2
from compression.llm.evaluate import Evaluation, check_positions, evaluation_windows, samples
from compression.runtime import UserError
from compression.timing import interleaved_times, measure_latency, size_on_disk

CPU = torch.device("cpu")


def test_metrics_of_a_small_example():
    # Margins of the positive class, from sure-negative to sure-positive; predicted positive where above 0.
    margins = torch.tensor([-3.0, -1.0, 1.0, 2.0, -2.0, 3.0, 4.0, 0.5])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1, 1])
    metrics = classification_metrics(torch.stack([torch.zeros(8), margins], dim=1), labels, SST2)
    assert metrics["confusion_matrix"] == [[2, 1], [1, 4]]
    assert metrics["n"] == 8
    assert metrics["accuracy"] == 6 / 8
    assert metrics["accuracy_standard_error"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    assert metrics["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert metrics["f1_macro"] == pytest.approx((2 * 4 / 10 + 2 * 2 / 6) / 2)
    # Of the 3 * 5 pairs, the negative at 1.0 is wrong against the positives at -1.0 and 0.5.
    assert metrics["roc_auc"] == pytest.approx(13 / 15)


def test_texts_on_which_two_models_disagree_come_by_how_far_they_are_apart():
    split = Split([f"text {place}" for place in range(24)] + [("a" * 300, "b" * 300)], [0] * 24 + [1])
    baseline = torch.tensor([[1.0, 0.0]] * 25)
    logits = torch.stack([torch.zeros(25), torch.arange(25) / 10], 1)
    logits[:2] = baseline[:2]  # the same class here, and that of a tie is the first
    found = disagreements(split, logits, baseline)
    assert found["n"] == 23 and len(found["examples"]) == LISTED_DISAGREEMENTS == 20
    pair, second, *_ = found["examples"]
    assert second == {"text": "text 23", "label": 0, "predicted": 1, "baseline": 0}
    assert pair["label"] == 1 and pair["text"].startswith("a" * 300 + " | bbb") and len(pair["text"]) == 400
    assert disagreements(split, baseline, baseline) == {"n": 0, "examples": []}


def test_samples_are_the_likeliest_words_behind_each_texts_beginning():
    model, words = tiny_decoder(eos_token_id=2), letters_tokenizer()
    windows = torch.randint(4, 30, (5, 24), generator=torch.Generator().manual_seed(3))
    found = samples(model, words, {"one": windows, "other": windows[3:]})
    assert [sample["text"] for sample in found] == ["one"] * 3 + ["other"] * 2
    ids = windows[0, :12].tolist()
    assert found[0]["prompt"] == words.decode(ids)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    assert found[0]["continuation"] == words.decode(ids[12:], skip_special_tokens=True)


THREE = replace(
    SST2,
    name="three",
    labels=("a", "b", "c"),
    metrics={name: METRICS[name] for name in ("accuracy", "f1_macro")},
    primary="f1_macro",
)


def test_metrics_of_three_classes():
    logits = torch.eye(3)[[0, 0, 1, 2, 2, 2]]
    metrics = classification_metrics(logits, torch.tensor([0, 1, 1, 2, 2, 0]), THREE)
    assert metrics["confusion_matrix"] == [[1, 0, 1], [1, 1, 0], [0, 0, 2]]
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1_macro"] == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)
    assert metrics["roc_auc"] is None and "f1" not in metrics
    assert describe_task(THREE)["metrics"] == {"accuracy": "Accuracy", "f1_macro": "Macro F1"}


def test_a_tasks_own_metric_stands_beside_those_of_every_task():
    metrics = {name: METRICS[name] for name in ("accuracy", "f1", "matthews_correlation")}
    cola = replace(SST2, metrics=metrics, primary="matthews_correlation")
    logits, labels = torch.eye(2)[[0, 1, 1, 1, 0, 1]], torch.tensor([0, 0, 1, 1, 1, 1])
    # (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)) with 3, 1, 1, 1
    found = classification_metrics(logits, labels, cola)
    assert found["matthews_correlation"] == score(logits, labels, cola) == pytest.approx(2 / (4 * 4 * 2 * 2) ** 0.5)
    names = ["n", "accuracy", "accuracy_standard_error", "f1", "matthews_correlation", "f1_macro", "roc_auc"]
    assert list(found) == [*names, "confusion_matrix"]


def test_paired_difference_knows_that_models_fail_on_the_same_rows():
    baseline = torch.tensor([True] * 80 + [False] * 20)
    same_rows = torch.tensor([True] * 79 + [False] * 21)
    other_rows = torch.tensor([False] * 21 + [True] * 79)
    first, second = paired_difference(same_rows, baseline), paired_difference(other_rows, baseline)
    assert first["accuracy_points"] == second["accuracy_points"] == pytest.approx(-1)
    # One row of 100 differs by -1: the variance is 0.01 - 0.0001, in points 100 times its root over 10.
    assert first["accuracy_points_standard_error"] == pytest.approx(10 * (0.01 - 0.0001) ** 0.5)
    assert second["accuracy_points_standard_error"] > 6 * first["accuracy_points_standard_error"]


def test_metrics_where_one_class_occurs():
    metrics = classification_metrics(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]), SST2)
    assert metrics["roc_auc"] is None
    assert (metrics["accuracy"], metrics["f1"], metrics["confusion_matrix"]) == (1.0, 0.0, [[2, 0], [0, 0]])


def test_predictions_are_in_the_order_of_the_rows(tiny_model):
    generator = torch.Generator().manual_seed(3)
    lengths = (9, 2, 5, 9, 1, 3, 7, 2)
    rows = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    encoded = Encoded({"input_ids": rows}, torch.zeros(len(rows), dtype=torch.long))
    order = torch.cat([batch["rows"] for batch in batches(encoded, 3, 0)]).tolist()
    assert order != sorted(order), "the batches must not be in the order of the rows, else this tests nothing"

    tiny_model.train()
    logits = predict(tiny_model, encoded, pad_token_id=0, task=SST2, batch_size=3)
    assert tiny_model.training
    tiny_model.eval()
    with torch.no_grad():
        alone = torch.cat([tiny_model(input_ids=torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
    assert alone.std(dim=0).min() > 1e-3, "rows that all look alike would hide a wrong order"


PAIRS = [("a b c", "d"), ("e", "f g"), ("h i j k", "l m n"), ("o", "p")]


def test_pairs_are_predicted_as_by_the_tokenizers_own_output(tokenizer, tiny_model):
    encoded = encode(tokenizer, Split(PAIRS, [0, 1, 0, 1]), 7)
    logits = predict(tiny_model, encoded, tokenizer.pad_token_id, SST2, batch_size=3)
    inputs = tokenizer(PAIRS, truncation=True, max_length=7, padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].any(), "pairs of one type would test nothing"
    of_bert = isinstance(tiny_model, BertForSequenceClassification)
    with torch.no_grad():
        expected = tiny_model(**{name: inputs[name] for name in inputs if of_bert or name != "token_type_ids"}).logits
        without = tiny_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert ((expected - without).abs().max() > 1e-3) == of_bert


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(tiny_model, bad):
    tiny_model.name_or_path = "models/teacher_model"
    tiny_model.classifier.bias.data[1] = bad
    with pytest.raises(UserError, match="^models/teacher_model: its logits are not finite on 2 of 2 sentences"):
        predict(tiny_model, Encoded({"input_ids": [[5, 6], [7]]}, torch.tensor([0, 1])), 0, SST2)


def test_models_of_other_than_two_labels_are_refused():
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=50)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
    model.name_or_path = "models/three"
    with pytest.raises(UserError, match="^models/three: has 3 labels; allowed are .*SST-2.*negative, positive"):
        predict(model, Encoded({"input_ids": [[5, 6], [7]]}, torch.tensor([0, 1])), 0, SST2)


def test_models_take_turns_in_rotating_order():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = interleaved_times(calls, rounds=4, device=CPU)
    warm_up = 3 * efficiency.WARM_UP_CALLS
    assert "".join(called[warm_up:]) == "abcbcacababc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


class Clock:
    """Stands in for `time`; it moves on only when a model is called."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class TimedModel(nn.Module):
    """Takes a known time per sequence, and notes what it was given."""

    def __init__(self, clock, milliseconds):
        super().__init__()
        self.clock, self.milliseconds, self.inputs = clock, milliseconds, []
        self.config = SimpleNamespace(vocab_size=50, pad_token_id=1)

    def forward(self, input_ids, attention_mask):
        assert attention_mask.all() and attention_mask.shape == input_ids.shape
        self.clock.now += self.milliseconds * len(input_ids) / 1e3
        self.inputs.append(input_ids)


def test_latency_and_throughput_of_models_of_known_speed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(efficiency, "time", clock)
    models = {"slow": TimedModel(clock, 8.0), "fast": TimedModel(clock, 2.0)}
    measured = measure_latency(models, CPU, 12, latency_repeats=5, throughput_repeats=3, throughput_batch_size=32)
    for name, milliseconds in (("slow", 8.0), ("fast", 2.0)):
        latency, throughput = measured[name]["latency"], measured[name]["throughput"]
        assert latency["median_ms"] == pytest.approx(milliseconds)
        assert throughput["median_samples_per_second"] == pytest.approx(1000 / milliseconds)
        assert (latency["batch_size"], latency["repeats"]) == (1, 5)
        assert (throughput["batch_size"], throughput["repeats"]) == (32, 3)
        assert latency["sequence_length"] == throughput["sequence_length"] == 12
    slow, fast = (models[name].inputs for name in ("slow", "fast"))
    assert {tuple(ids.shape) for ids in slow} == {(1, 12), (32, 12)}
    assert all(torch.equal(one, other) for one, other in zip(slow, fast, strict=True))
    drawn = set(slow[-1].unique().tolist())
    assert len(drawn) > 40 and 1 not in drawn, "not random token ids, or padding among them"


def test_spread_is_the_median_and_the_outer_deciles(monkeypatch):
    durations = [11.0, 4, 2, 9, 6, 1, 10, 3, 8, 5, 7]
    monkeypatch.setattr(efficiency, "interleaved_times", lambda calls, *_, **__: {"a": [ms / 1e3 for ms in durations]})
    measured = measure_latency({"a": tiny_bert()}, CPU, 8, 11, 11, throughput_batch_size=2)["a"]
    assert [measured["latency"][f"{name}_ms"] for name in ("p10", "median", "p90")] == pytest.approx([2, 6, 10])
    rates = [measured["throughput"][f"{name}_samples_per_second"] for name in ("p10", "median", "p90")]
    assert rates == pytest.approx([200, 2000 / 6, 1000])


def test_size_on_disk_counts_weights_and_folder(tmp_path):
    for name, size in (("model-00001.safetensors", 300), ("model-00002.safetensors", 200), ("config.json", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "more.txt").write_bytes(bytes(5))
    assert size_on_disk(tmp_path) == {"weights_bytes": 500, "folder_bytes": 512}


@pytest.mark.parametrize("kind", ["ppl", "efficiency"])
def test_windows_beyond_the_models_positions_are_refused(kind):
    model = tiny_decoder()
    check_positions(model, "analysis_length", 64)
    with pytest.raises(UserError, match="^--analysis_length 65: allowed is at most 64, the model's positions$"):
        check_positions(model, "analysis_length", 65)
    with pytest.raises(UserError, match="^--eval_length 65: allowed is at most 64, the model's positions$"):
        evaluation_windows(Evaluation(run_evaluation=kind, eval_length=65), None, None, model)
    assert evaluation_windows(Evaluation(run_evaluation="none", eval_length=65), None, None, model) == {}
