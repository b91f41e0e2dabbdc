"""Recovery training through its real entry points, on a tiny model whose layers differ and lack parts."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODERS, MORE_DECODERS, WORDS, letters, save_decoder, tiny_decoder
from scripts import ROOT, run_elsewhere, run_script
from test_lora import pruned
from test_training import Killed
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

import evaluate_lora_model
import merge_and_save_lora
from compression.checkpoint import load_language_model, load_tensors
from compression.config import pick
from compression.files import read_json
from compression.llm.agreement import agreement, last_states
from compression.llm.lora import load_adapter
from compression.llm.perplexity import perplexity
from compression.llm.recovery import LanguageModelling, recover
from compression.llm.recovery_data import training_data
from compression.llm.recovery_settings import Recovery
from compression.llm.rows import of_instructions, of_windows, packed, read_instructions
from compression.llm.teacher import LiveTeacher
from compression.llm.text import load_corpus, sample_windows, tokenize, windows
from compression.quantization import nf4_base
from compression.runtime import UserError, setup_logging
from compression.schedule import SCHEDULES
from compression.stage_record import read_stage
from compression.training import fit
from post_training import PostTrainingConfig

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
ADAPTER_FILES |= {"stage.json", "training_history.json"}
ALPACA = [
    {"instruction": f"{WORDS[row]} b", "input": "c d" if row % 3 else "", "output": " ".join(WORDS[: 1 + row % 7])}
    for row in range(20)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model, a pruned one that was made from it, a text, and instructions."""
    folder = tmp_path_factory.mktemp("recovery")
    save_decoder(folder / "dense", tiny_decoder(max_position_embeddings=128))
    save_decoder(folder / "pruned", pruned(), {"stage": "global_pruning", "parent": str(folder / "dense")})
    (folder / "text.txt").write_text(letters(6_000))
    (folder / "unseen.txt").write_text(letters(6_000, seed=3))
    (folder / "alpaca.json").write_text(json.dumps(ALPACA))
    (folder / "alpaca.jsonl").write_text("\n".join(map(json.dumps, ALPACA)))
    return folder


def settings(folder, **changes):
    text = str(folder / "text.txt")
    fields = dict(
        dataset=text,
        validation_dataset=text,
        eval_ppl_datasets=text,
        max_length=16,
        eval_length=16,
        eval_samples=8,
        agreement_text="none",
        finetune_samples=24,
        validation_samples=4,
        batch_size=4,
        learning_rate=5e-3,
        save_steps=2,
        dtype="float32",
        amp="no",
    )
    return pick(Recovery, PostTrainingConfig.make(**fields | changes))


def text_perplexity(folder, model, length=16):
    """On the test part, as the settings have it."""
    _, tokenizer = load_language_model(folder / "pruned")
    every = windows(tokenize(tokenizer, load_corpus(str(folder / "text.txt"), "test")), length)[:8]
    return perplexity(model, every)


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(2, 18)[None]).logits


def test_lora_trains_and_ordinary_peft_loads_it_elsewhere(folder, tmp_path):
    metrics = recover(settings(folder), folder / "pruned", tmp_path / "lora")
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}, "nothing to resume from is left"
    assert {path.name for path in (tmp_path / "lora").iterdir()} == ADAPTER_FILES
    history = read_json(tmp_path / "lora" / "training_history.json")
    assert history[1]["loss"] < 0.95 * history[0]["loss"]
    assert history[1]["validation_perplexity"] < history[0]["validation_perplexity"]

    model, _ = load_language_model(folder / "pruned")
    assert metrics["before"]["perplexity"]["text.txt"] == pytest.approx(text_perplexity(folder, model), rel=1e-6)
    load_adapter(model, tmp_path / "lora", "--lora_dir")
    after = metrics["after"]["perplexity"]["text.txt"]
    assert after == pytest.approx(text_perplexity(folder, model), rel=1e-6)
    assert after < 0.9 * metrics["before"]["perplexity"]["text.txt"]

    stage = read_stage(tmp_path / "lora")
    assert stage["parent"] == str(folder / "pruned") and stage["metrics"] == metrics and stage["seed"] == 42
    added = metrics["after"]["parameters"]["total"] - metrics["before"]["parameters"]["total"]
    assert metrics["trained"] == added > 0

    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32);"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval();"
        "torch.save(model(torch.arange(2, 18)[None]).logits, 'logits.pt')"
    )
    run_elsewhere(script, tmp_path, folder / "pruned", tmp_path / "lora").check()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), atol=1e-5, rtol=0)


def test_full_training_gives_an_ordinary_checkpoint(folder, tmp_path):
    metrics = recover(settings(folder, finetune_method="full"), folder / "pruned", tmp_path / "full")
    assert (tmp_path / "full" / "pruned_decoder.py").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    after = metrics["after"]["perplexity"]["text.txt"]
    assert after == pytest.approx(text_perplexity(folder, model), rel=1e-6)
    assert after < 0.9 * metrics["before"]["perplexity"]["text.txt"]
    start = pruned().state_dict()
    assert not any(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert metrics["after"]["layers"] == metrics["before"]["layers"]


def test_adapters_on_4_bit_weights(folder, tmp_path):
    metrics = recover(settings(folder, load_in_4bit=True), folder / "pruned", tmp_path / "lora")
    after = metrics["after"]["perplexity"]["text.txt"]
    assert after < 0.9 * metrics["before"]["perplexity"]["text.txt"]
    model, _ = load_language_model(folder / "pruned", quantization=nf4_base())
    assert metrics["before"]["perplexity"]["text.txt"] == pytest.approx(text_perplexity(folder, model), rel=1e-5)
    load_adapter(model, tmp_path / "lora", "--lora_dir")
    assert after == pytest.approx(text_perplexity(folder, model), rel=1e-5)
    exact, _ = load_language_model(folder / "pruned")
    load_adapter(exact, tmp_path / "lora", "--lora_dir")
    assert after != pytest.approx(text_perplexity(folder, exact), rel=1e-4), "the base really was in 4 bits"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kill_at", [0, 4, 9])
def test_killed_and_resumed_equals_undisturbed(folder, tmp_path, monkeypatch, method, kill_at):
    """Six steps an epoch, a state after every second one."""
    fields = dict(finetune_method=method, lora_dropout=0.2, resume=True)
    recover(settings(folder, **fields), folder / "pruned", tmp_path / "whole")

    def kill(self, step):
        if step == kill_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelling, "after_step", kill)
        with pytest.raises(Killed):
            recover(settings(folder, **fields), folder / "pruned", tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    states = list(tmp_path.glob(".killed_*.resume/step_*"))
    assert len(states) == (kill_at > 1)
    for state in states:
        names = load_tensors(state / "model.safetensors").keys()
        assert all("lora_" in name for name in names) == (method == "lora")
    recover(settings(folder, **fields), folder / "pruned", tmp_path / "killed")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    for name in (weights, "training_history.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_stage(tmp_path / "killed")["metrics"] == read_stage(tmp_path / "whole")["metrics"]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_is_the_mean_over_the_tokens_of_the_whole_batch(folder, tmp_path, parts):
    """However a batch is cut; its rows have one to eight tokens to predict."""
    model, tokenizer = load_language_model(folder / "pruned")
    train = of_instructions(tokenizer, ALPACA[:8], 128, train_on_inputs=False)
    losses, gradients = [], {}
    for row, start in zip(train.ids, train.first, strict=True):
        ids = torch.tensor([row])
        losses.append(F.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="none"))
    assert {len(loss) for loss in losses} >= {2, 8}
    expected = torch.cat(losses).mean()
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    config = settings(folder, batch_size=8, gradient_accumulation_steps=parts, num_epochs=1)
    recipe = LanguageModelling(config, len(train))
    recipe.after_backward = lambda _: gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})
    history = fit(model, recipe, train, lambda _: {}, tmp_path, 0)
    assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_recomputed_activations_give_the_same_adapter(folder, tmp_path):
    for recompute in (False, True):
        recover(settings(folder, gradient_checkpointing=recompute), folder / "pruned", tmp_path / str(recompute))
    first, second = (load_tensors(tmp_path / str(flag) / "adapter_model.safetensors") for flag in (False, True))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=1e-4)


# Data.


@pytest.mark.parametrize("name", ["alpaca.json", "alpaca.jsonl"])
def test_only_the_response_is_predicted(folder, name):
    _, tokenizer = load_language_model(folder / "pruned")
    rows = read_instructions(folder / name)
    train = of_instructions(tokenizer, rows, 128, train_on_inputs=False)
    batch = train.collate([5, 7], pad_token_id=0)
    for place, row in enumerate((ALPACA[5], ALPACA[7])):
        predicted = batch["input_ids"][place][batch["targets"][place]].tolist()
        assert predicted == tokenizer(row["output"])["input_ids"] + [tokenizer.eos_token_id]
    assert train.weights[5] == 7 and train.weights[7] == 2
    everything = of_instructions(tokenizer, rows, 128, train_on_inputs=True)
    assert everything.ids == train.ids
    targets = everything.collate([5, 7], pad_token_id=0)["targets"]
    assert targets[:, 0].sum() == 0 and torch.equal(targets[:, 1:], batch["attention_mask"][:, 1:].bool())


def test_prompts_that_leave_no_place_are_left_out(folder):
    _, tokenizer = load_language_model(folder / "pruned")
    long = len(of_instructions(tokenizer, ALPACA[1:2], 500, True).ids[0])
    rows = [{"instruction": "a " * 100, "output": "b"}, ALPACA[1]]
    kept = of_instructions(tokenizer, rows, long - 1, train_on_inputs=False)
    assert len(kept) == 1 and kept.weights.tolist() == [2], "cut by one token, the end"
    with pytest.raises(UserError, match="--max_length 8: every prompt is longer"):
        of_instructions(tokenizer, rows, 8, train_on_inputs=False)


def test_training_reads_the_train_part_and_judges_by_the_validation_part(folder, tmp_path, monkeypatch):
    asked = []

    def watching(name, part, data_dir, **options):
        asked.append(part)
        return load_corpus(name, part, data_dir, **options)

    monkeypatch.setattr("compression.llm.mixture.load_corpus", watching)
    recover(settings(folder, run_evaluation="none", num_epochs=1), folder / "pruned", tmp_path / "out")
    assert asked == ["train", "validation"]


def test_instructions_train(folder, tmp_path):
    config = settings(folder, dataset=str(folder / "alpaca.json"), max_length=100, finetune_samples=10)
    recover(config, folder / "pruned", tmp_path / "out")
    stage = read_stage(tmp_path / "out")
    assert stage["data"]["rows"] == 10 and stage["data"]["name"] == "alpaca.json"
    history = read_json(tmp_path / "out" / "training_history.json")
    assert history[-1]["loss"] < history[0]["loss"]


def predicted(rows):
    """The tokens to predict of each row."""
    return [row[first:] for row, first in zip(rows.ids, rows.first, strict=True)]


@pytest.mark.parametrize("tokens", [1, 15, 100, 150, 1_000])
def test_a_budget_of_tokens_is_spent_exactly(folder, tokens):
    """The text has 320 windows of 15 tokens to predict in its train part, the instructions 4 to 20 tokens a row."""
    model, tokenizer = load_language_model(folder / "pruned")
    for name in ("text.txt", "alpaca.json"):
        config = settings(folder, dataset=str(folder / name), tokens=tokens, max_length=16 if "text" in name else 128)
        rows, data = training_data(config, None, tokenizer, model)
        assert sum(map(len, predicted(rows))) == rows.weights.sum() == data["tokens"] == tokens
        assert data["tokens_read"] == sum(map(len, rows.ids)) and min(map(len, predicted(rows))) > 0
        other, _ = training_data(config.updated(seed=1), None, tokenizer, model)
        assert other.digest() != rows.digest()


def test_a_budget_beyond_the_text_goes_through_all_of_it_before_any_twice(folder):
    model, tokenizer = load_language_model(folder / "pruned")
    whole = of_instructions(tokenizer, ALPACA, 128, train_on_inputs=False)
    tokens = int(2.5 * whole.weights.sum())
    config = settings(folder, dataset=str(folder / "alpaca.json"), tokens=tokens, max_length=128)
    rows, _ = training_data(config, None, tokenizer, model)
    passes = [rows.ids[:20], rows.ids[20:40], rows.ids[40:-1]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(whole.ids) and passes[0] != passes[1]
    assert all(row in whole.ids for row in passes[2]) and len(passes[2]) < 19


def test_a_budget_of_tokens_is_one_epoch_and_its_speed_is_said(folder, tmp_path):
    flags = [*training_flags(folder), "--tokens", 200, "--num_epochs", 3, "--batch_size", 4, "--schedule", "wsd"]
    said = run_script(TRAIN, *flags, "--results_dir", tmp_path, "--run_evaluation", "none").stdout
    stage = read_stage(tmp_path / "recovered")
    assert stage["data"]["tokens"] == stage["config"]["tokens"] == 200 and stage["config"]["num_epochs"] == 1
    assert len(read_json(tmp_path / "recovered" / "training_history.json")) == 1
    assert "tokens/s in training)" in said


@pytest.mark.parametrize("length", [60, 61, 100, 1_000])
def test_packing_keeps_every_token_once_and_in_order(folder, length):
    _, tokenizer = load_language_model(folder / "pruned")
    rows = of_instructions(tokenizer, ALPACA, length, train_on_inputs=False)
    windows = packed(rows, length)
    whole = windows.collate(list(range(len(windows))), pad_token_id=0)
    real = whole["attention_mask"].bool()
    for name, expected in (("input_ids", rows.ids), ("position_ids", [range(len(row)) for row in rows.ids])):
        assert whole[name][real].tolist() == [value for row in expected for value in row]
    assert whole["input_ids"][whole["targets"]].tolist() == sum(predicted(rows), [])
    assert windows.lengths.tolist() == real.sum(1).tolist() and max(windows.lengths) <= length
    assert windows.weights.tolist() == whole["targets"].sum(1).tolist() and min(windows.weights) > 0
    last = [rows.ids[window.stop - 1][-1] for window in windows.windows]
    assert last == [tokenizer.eos_token_id] * len(windows)
    sizes = [[len(rows.ids[row]) for row in window] for window in windows.windows]
    assert all(sum(own) + later[0] > length for own, later in zip(sizes, sizes[1:], strict=False)), "room was left"


@pytest.mark.parametrize("family", [*DECODERS, *MORE_DECODERS])
def test_packed_rows_see_nothing_of_each_other(folder, family):
    """Loss and gradients are those of the rows one by one; of the teacher too."""
    _, tokenizer = load_language_model(folder / "pruned")
    rows = of_instructions(tokenizer, ALPACA[:8], 60, train_on_inputs=False)
    windows = packed(rows, 60)
    assert len(windows) < 6
    teacher, model = tiny_decoder(family, seed=1), pruned(family)
    gradients, found = [], []
    for data in (rows, windows):
        recipe = LanguageModelling(settings(folder, kd_weight=0.5), len(data), LiveTeacher(teacher, 2.0))
        terms = recipe.loss(recipe.module(model), data.collate(list(range(len(data))), 0), 0)
        model.zero_grad()
        terms["loss"].backward()
        found.append({name: term.item() for name, term in terms.items()})
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_packed_instructions_train(folder, tmp_path):
    config = settings(folder, dataset=str(folder / "alpaca.json"), max_length=60, packing=True, tokens=60)
    recover(config, folder / "pruned", tmp_path / "out")
    data = read_stage(tmp_path / "out")["data"]
    assert data["tokens"] == 60 and data["windows"] < data["rows"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_schedule_sets_the_learning_rate(folder, schedule):
    recipe = LanguageModelling(settings(folder, schedule=schedule, warmup_ratio=0.5, num_epochs=1), 40)
    rates = [recipe.learning_rate(step) for step in range(10)]
    assert rates == [5e-3 * SCHEDULES[schedule](step, 10, 5) for step in range(10)]


# Distillation.


def test_teacher_is_the_parent_and_counts(folder, tmp_path):
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        recover(settings(folder, kd_weight=weight, num_epochs=1), folder / "pruned", tmp_path / str(weight))
        losses[weight] = read_json(tmp_path / str(weight) / "training_history.json")[0]
    assert read_stage(tmp_path / "0.5")["inputs"]["teacher"]["path"] == str(folder / "dense")
    assert "teacher" not in read_stage(tmp_path / "0.0")["inputs"]
    half = losses[0.5]
    assert half["loss"] == pytest.approx(0.5 * half["soft_label_loss"] + 0.5 * half["cross_entropy"], rel=1e-5)
    assert losses[1.0]["soft_label_loss"] < half["soft_label_loss"] and losses[1.0]["loss"] != losses[0.0]["loss"]
    weights = [load_tensors(tmp_path / str(weight) / "adapter_model.safetensors") for weight in losses]
    assert not all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_model_has_nothing_to_learn_from_itself(folder):
    model, _ = load_language_model(folder / "pruned")
    train = of_windows(torch.randint(4, 30, (3, 12), generator=torch.Generator().manual_seed(0)))
    recipe = LanguageModelling(settings(folder, kd_weight=0.7), 3, LiveTeacher(model, 2.0))
    terms = recipe.loss(recipe.module(model), train.collate([0, 1, 2], 0), 0)
    assert terms["soft_label_loss"].abs() < 1e-6
    torch.testing.assert_close(terms["loss"], 0.3 * terms["cross_entropy"], atol=1e-5, rtol=0)


# Merging and evaluation.


@pytest.fixture(scope="module")
def adapter(folder):
    recover(settings(folder), folder / "pruned", folder / "adapter")
    return folder / "adapter"


def test_merged_checkpoint_computes_what_the_adapter_does(folder, adapter, tmp_path):
    config = merge_and_save_lora.MergeConfig(folder / "pruned", adapter, tmp_path / "merged")
    merge_and_save_lora.main(config)
    model, _ = load_language_model(folder / "pruned")
    load_adapter(model, adapter, "--lora_dir")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == "PrunedLlamaForCausalLM"
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    assert (logits(merged) - logits(pruned())).abs().max() > 0.1
    stage = read_stage(tmp_path / "merged")
    assert stage["parent"] == str(folder / "pruned") and stage["inputs"]["adapter"]["path"] == str(adapter)


def test_a_merge_that_changes_the_logits_is_not_written(folder, adapter, tmp_path, monkeypatch):
    def wrong(self):
        return self.unload()

    monkeypatch.setattr("peft.PeftModelForCausalLM.merge_and_unload", wrong, raising=False)
    with pytest.raises(UserError, match="merged and adapted model differ by .* nothing was saved"):
        merge_and_save_lora.main(merge_and_save_lora.MergeConfig(folder / "pruned", adapter, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_evaluation_side_by_side(folder, adapter, tmp_path, capsys):
    config = evaluate_lora_model.LoraEvaluationConfig.make(
        pruned_model=folder / "pruned",
        lora_dir=adapter,
        output_file=tmp_path / "found.json",
        efficiency_repeats=1,
        run_evaluation="ppl,efficiency",
        eval_ppl_datasets=str(folder / "text.txt"),
        eval_length=32,
        eval_samples=8,
        dtype="float32",
        dense_model=folder / "dense",
        agreement_text=str(folder / "text.txt"),
        agreement_length=32,
    )
    setup_logging()
    evaluate_lora_model.main(config)
    found = json.loads((tmp_path / "found.json").read_text())["models"]
    values = {name: figures["perplexity"]["text.txt"] for name, figures in found.items()}
    dense, _ = load_language_model(folder / "dense")
    assert values["dense"] == pytest.approx(text_perplexity(folder, dense, 32), rel=1e-6)
    model, _ = load_language_model(folder / "pruned")
    assert values["base"] == pytest.approx(text_perplexity(folder, model, 32), rel=1e-6)
    load_adapter(model, adapter, "--lora_dir")
    assert values["base+adapter"] == pytest.approx(text_perplexity(folder, model, 32), rel=1e-6)
    assert values["base+adapter"] < values["base"]
    assert values["merged"] == pytest.approx(values["base+adapter"], rel=1e-4)
    macs = {name: figures["efficiency"]["ratios"]["macs"] for name, figures in found.items()}
    assert macs["base"] == macs["merged"] == 1 < macs["base+adapter"] and macs["dense"] > 1
    compared = {name: figures["agreement"] for name, figures in found.items()}
    assert (compared["dense"]["kl"], compared["dense"]["top1"]) == (0, 1)
    assert compared["base"]["kl"] > 0 and compared["base"]["top1"] < 1
    assert compared["merged"]["kl"] == pytest.approx(compared["base+adapter"]["kl"], rel=1e-2)
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("perplexity, text.txt"))
    assert line.split()[2:] == [f"{value:.2f}" for value in values.values()]
    (line,) = (line for line in printed.splitlines() if line.startswith("KL to the dense model, text.txt"))
    assert line.split()[6:] == [f"{figures['kl']:.3f}" for figures in compared.values()]


# How near to the dense model on other text.


def unseen(folder):
    return dict(agreement_text=str(folder / "unseen.txt"), agreement_length=32, agreement_samples=4)


def unseen_windows(folder):
    _, tokenizer = load_language_model(folder / "dense")
    ids = tokenize(tokenizer, load_corpus(str(folder / "unseen.txt"), "test"))
    return sample_windows(ids, 32, 4, settings(folder).training.seed)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_compared_with_the_dense_model_on_text_that_it_has_not_seen(folder, tmp_path, method):
    metrics = recover(settings(folder, finetune_method=method, **unseen(folder)), folder / "pruned", tmp_path / "out")
    dense, _ = load_language_model(folder / "dense")
    trained, _ = load_language_model(folder / "pruned" if method == "lora" else tmp_path / "out")
    if method == "lora":
        load_adapter(trained, tmp_path / "out", "--lora_dir")
    windows = unseen_windows(folder)
    models = {"before": load_language_model(folder / "pruned")[0], "after": trained}
    for when, model in models.items():
        expected = agreement(model, windows, last_states(dense, windows), dense.lm_head)
        found = metrics[when]["agreement"]
        assert {name: found[name] for name in expected} == expected, "by the dense model's own head"
        assert found["text"]["name"] == "unseen.txt" and found["windows"] == [4, 32]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| kl_from_dense | {found['kl']:.4f} | {metrics['before']['agreement']['kl']:.4f} |" in card
    plain = settings(folder, finetune_method=method)
    recover(plain, folder / "pruned", tmp_path / "plain")
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two = (load_tensors(tmp_path / each / name) for each in ("out", "plain"))
    assert all(torch.equal(value, two[key]) for key, value in one.items()), "comparing changes nothing"


def test_without_the_dense_model_nothing_is_compared_unless_that_is_asked_for(folder, tmp_path, caplog):
    save_decoder(tmp_path / "foundling", pruned())
    small = dict(num_epochs=1, finetune_samples=4, agreement_length=32)
    auto = settings(folder, **small, agreement_text="auto")
    with caplog.at_level("INFO"):
        metrics = recover(auto, tmp_path / "foundling", tmp_path / "out")
    assert "agreement" not in metrics["before"] and "agreement" not in metrics["after"]
    assert "Agreement with the dense model: left out (--agreement_text auto: needs the dense model, and " in caplog.text
    asked = settings(folder, **small | unseen(folder))
    with pytest.raises(UserError, match="unseen.txt: needs the dense model, and .* name it: --teacher"):
        recover(asked, tmp_path / "foundling", tmp_path / "asked")
    assert not list(tmp_path.glob("*asked*"))
    named = settings(folder, **small | unseen(folder), teacher=folder / "dense")
    found = recover(named, tmp_path / "foundling", tmp_path / "named")["before"]["agreement"]
    dense, _ = load_language_model(folder / "dense")
    windows = unseen_windows(folder)
    assert found["kl"] == agreement(pruned(), windows, last_states(dense, windows), dense.lm_head)["kl"]


# The command line.


TRAIN, MERGE, EVALUATE = "post_training.py", "merge_and_save_lora.py", "evaluate_lora_model.py"


def training_flags(folder):
    """The pruned model, the text that it is trained and measured on, and short windows of it."""
    text = folder / "text.txt"
    texts = ["--dataset", text, "--eval_ppl_datasets", text, "--agreement_text", "none"]
    return ["--pruned_model", folder / "pruned", *texts, "--max_length", 16, "--eval_length", 16]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (TRAIN, "--pruned_model nowhere", "--pruned_model nowhere: no checkpoint there; make it with: python run_gl"),
        (TRAIN, "--pruned_model {}/bert", "bert: model type 'bert' is not supported here; supported: "),
        (TRAIN, "--pruned_model {}/quantized", "quantized: is quantized already; name the model it was made from"),
        (TRAIN, "--dataset none.json", "--dataset none.json: no such file; allowed are text files, files of instr"),
        (TRAIN, "--dataset wiki", "--dataset wiki: no such file; allowed are text files, files of instructi"),
        (TRAIN, "--dataset {}/broken.json", "broken.json: is no valid JSON ("),
        (TRAIN, "--dataset {}/broken.jsonl", "broken.jsonl: is no valid JSON lines ("),
        (TRAIN, "--dataset {}/object.json", "object.json: holds a dict; allowed is a list of rows"),
        (TRAIN, "--dataset {}/empty.json", "empty.json: holds no rows; each must have instruction, input and output"),
        (TRAIN, "--dataset {}/odd.json", 'odd.json: row 2 is {"instruction": "a"}; a row must have instruction'),
        (TRAIN, "--dataset ptb --data_dir {}", "has no ptb/ptb.train.txt; name another folder"),
        (TRAIN, "--validation_dataset {}/alpaca.json", "alpaca.json: allowed is plain text, not instructions"),
        (TRAIN, "--eval_ppl_datasets wiki", "text 'wiki': no such file; allowed is a text file or one of wikitext2"),
        (TRAIN, "--load_in_4bit --finetune_method full", "--load_in_4bit: not allowed with --finetune_method full"),
        (TRAIN, "--shard --load_in_4bit", "--shard: not allowed with --load_in_4bit"),
        (TRAIN, "--dtype bfloat16 --finetune_method full", "--dtype bfloat16: with --finetune_method full allowed is"),
        (TRAIN, "--finetune_samples 0", "--finetune_samples 0: allowed is at least 1"),
        (TRAIN, "--packing", "--packing: is for instructions (.json, .jsonl); the windows of --dataset "),
        (
            TRAIN,
            "--packing --dataset {}/alpaca.json --kd_weight 1 --teacher_cache 8",
            "--packing: not allowed with --teacher_cache 8; leave one out",
        ),
        (TRAIN, "--tokens 0", "--tokens 0: allowed is at least 1"),
        (TRAIN, "--lora_r 0", "--lora_r 0: allowed is at least 1"),
        (TRAIN, "--lora_projections q_proj,lm_head", "unknown lm_head; allowed are q_proj, k_proj"),
        (TRAIN, "--gradient_accumulation_steps 9", "--gradient_accumulation_steps 9: allowed is 1 to 4"),
        (TRAIN, "--max_length 4096", "--max_length 4096: allowed is at most 128, the model's positions"),
        (TRAIN, "--kd_weight 2", "--kd_weight 2.0: allowed is 0 to 1"),
        (TRAIN, "--kd_weight 0.5 --teacher nowhere", "--teacher nowhere: no checkpoint there; make it with"),
        (TRAIN, "--kd_weight 0.5 --pruned_model {}/dense", "dense does not say what it was made from (stage.json)"),
        (TRAIN, "--kd_weight 0.5 --teacher {}/wide", "wide: it has 121 tokens, allowed are the student's 120"),
        (TRAIN, "--teacher_cache 8", "--teacher_cache 8: is used with --kd_weight above 0 alone; give that too"),
        (TRAIN, "--teacher_offload cpu", "--teacher_offload cpu: is used with --kd_weight or --hidden_weight above 0"),
        (TRAIN, "--kd_weight 0.5 --teacher_cache 121", "--teacher_cache 121: allowed is 0 to 120"),
        (TRAIN, "--teacher {}/dense", "dense: is used with --kd_weight or --hidden_weight above 0, with --lora_ran"),
        (TRAIN, "--agreement_text wiki", "--agreement_text wiki: no such file; allowed are auto, none, a text file"),
        (TRAIN, "--agreement_text {}/text.txt", "text.txt: is in --dataset; name another text, or none"),
        (TRAIN, "--agreement_text {}/unseen.txt", "--agreement_length 512: allowed is at most 128, the model's pos"),
        (TRAIN, "--agreement_text {}/unseen.txt --pruned_model {}/dense", "unseen.txt: needs the dense model, and "),
        (TRAIN, "--agreement_text auto --teacher nowhere", "--teacher nowhere: no checkpoint there; make it with"),
        (TRAIN, "--hidden_weight -1", "--hidden_weight -1.0: allowed is at least 0"),
        (TRAIN, "--hidden_weight 1 --teacher_cache 8", "--teacher_cache 8: keeps no hidden states; not "),
        (TRAIN, "--hidden_weight 1 --pruned_model {}/dense", "--hidden_weight: needs the dense model, and "),
        (TRAIN, "--hidden_weight 1 --teacher {}/thick", "thick: it has 64 hidden features, allowed are the stu"),
        (TRAIN, "--hidden_weight 1 --teacher {}/deep", "pruned has 4 of the 5 layers of "),
        (TRAIN, "--lora_rank_by_share --finetune_method full", "--lora_rank_by_share: not allowed with --finetune_me"),
        (TRAIN, "--lora_rank_by_share --pruned_model {}/dense", "--lora_rank_by_share: needs the dense model, and "),
        (
            TRAIN,
            "--run_evaluation efficiency --eval_length 32",
            "unknown efficiency; allowed are ppl, zeroshot, separated by commas",
        ),
        (TRAIN, "--output_name a/b", "--output_name 'a/b': allowed is a plain folder name"),
        (TRAIN, "--output_dir {}/pruned", "pruned: is an input of this run; name another place"),
        (MERGE, "--pruned_model nowhere", "--pruned_model nowhere: no checkpoint there"),
        (MERGE, "--lora_dir nowhere", "--lora_dir nowhere: no adapter there (no adapter_config.json); make it with"),
        (MERGE, "--pruned_model {}/dense", "the adapter does not fit the model ("),
        (MERGE, "--pruned_model {}/bert", "model type 'bert' is not supported here"),
        (MERGE, "--output_dir {}/pruned", "pruned: is an input of this run; name another place"),
        (EVALUATE, "--run_evaluation efficiency", "--eval_length 16: allowed is at least 32"),
        (EVALUATE, "--lora_dir nowhere", "--lora_dir nowhere: no adapter there"),
        (EVALUATE, "--dense_model nowhere", "--dense_model nowhere: no"),
        (EVALUATE, "--merged_model nowhere", "--merged_model nowhere: no checkpoint there; make it with: python merge"),
        (EVALUATE, "--pruned_model {}/dense", "the adapter does not fit the model ("),
        (EVALUATE, "--run_evaluation zeroshot --data_dir {}", "has no zeroshot/piqa/validation.jsonl"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(folder, adapter, bad_inputs, tmp_path, script, flags, message):
    text, output = folder / "text.txt", tmp_path / "output"
    known = {
        TRAIN: [*training_flags(folder), "--eval_samples", 2, "--batch_size", 4, "--results_dir", output],
        MERGE: ["--pruned_model", folder / "pruned", "--lora_dir", adapter, "--output_dir", output / "merged"],
        EVALUATE: [
            *("--pruned_model", folder / "pruned", "--lora_dir", adapter, "--output_file", output / "found.json"),
            *("--run_evaluation", "ppl", "--eval_ppl_datasets", text, "--eval_length", 16),
        ],
    }[script]
    before = sorted(folder.rglob("*"))
    stderr = run_script(script, *known, *flags.format(*[folder] * 2).split(), expect=2).stderr
    assert message in stderr and stderr.startswith("error: ") and len(stderr.strip().splitlines()) == 1
    assert not list(output.rglob("*")) and sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def bad_inputs(folder):
    (folder / "broken.json").write_text("[{")
    (folder / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{')
    (folder / "object.json").write_text('{"instruction": "a", "output": "b"}')
    (folder / "empty.json").write_text("[]")
    (folder / "odd.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]')
    save_decoder(folder / "wide", tiny_decoder(vocab_size=121))
    save_decoder(folder / "thick", tiny_decoder(hidden_size=64))
    save_decoder(folder / "deep", tiny_decoder(num_hidden_layers=5))
    sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=50)
    save_decoder(folder / "bert", BertLMHeadModel(BertConfig(**sizes, is_decoder=True)))
    save_decoder(folder / "quantized", tiny_decoder())
    config = read_json(folder / "quantized" / "config.json")
    config["quantization_config"] = {"load_in_4bit": True}
    (folder / "quantized" / "config.json").write_text(json.dumps(config))


def test_finished_run_is_skipped_until_something_changes(folder, tmp_path):
    flags = [*training_flags(folder), "--fast", "--finetune_samples", 4, "--results_dir", tmp_path, "--skip_existing"]
    run_script(TRAIN, *flags)
    created = read_stage(tmp_path / "recovered")["created"]
    assert "exists and matches configuration and inputs: skipped" in run_script(TRAIN, *flags).stdout
    assert read_stage(tmp_path / "recovered")["created"] == created
    run_script(TRAIN, *flags, "--lora_r", 2, expect=2)
    assert read_stage(tmp_path / "recovered")["created"] == created
    run_script(TRAIN, *flags, "--lora_r", 2, "--overwrite")
    assert read_stage(tmp_path / "recovered")["created"] != created


def test_two_processes_agree_with_one(folder, tmp_path):
    """With Accelerate's own launcher, as users start them."""
    text = str(folder / "text.txt")
    flags = [
        TRAIN,
        "--pruned_model",
        folder / "pruned",
        "--dataset",
        folder / "alpaca.json",
        "--max_length",
        100,
        "--validation_dataset",
        text,
        "--eval_ppl_datasets",
        text,
        "--eval_length",
        16,
        "--eval_samples",
        8,
        "--agreement_text",
        folder / "unseen.txt",
        "--agreement_length",
        32,
        "--agreement_samples",
        5,
        "--batch_size",
        8,
        "--gradient_accumulation_steps",
        2,
        "--learning_rate",
        "1e-3",
        "--results_dir",
        tmp_path,
        "--dtype",
        "float32",
        "--amp",
        "no",
    ]
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--main_process_port",
        0,
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", 1]
    run_script(*flags, "--output_name", "one")
    command = [sys.executable, *map(str, [*launcher, *flags, "--output_name", "two"])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "on 2 process(es)" in result.stdout and result.stdout.count("epoch 2") == 1
    one, two = (read_json(tmp_path / name / "training_history.json") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "validation_perplexity"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)
    one, two = (read_stage(tmp_path / name)["metrics"] for name in ("one", "two"))
    assert two["before"] == one["before"]
    for name, value in one["after"]["perplexity"].items():
        assert two["after"]["perplexity"][name] == pytest.approx(value, rel=1e-4)
    assert two["after"]["agreement"]["kl"] == pytest.approx(one["after"]["agreement"]["kl"], rel=1e-3)
