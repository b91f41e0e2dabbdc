"""Every benchmark runs on tiny random models and says what it is there to say."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    KEPT,
    WORDS,
    bytes_tokenizer,
    letters,
    save_decoder,
    tiny_bert,
    tiny_decoder,
    tiny_distilbert,
    write_zero_shot,
)
from scripts import ROOT, run_script, start_script
from test_ablate import SCRIPT

from compression.checkpoint import save_checkpoint
from compression.quantization import Format, pack
from compression.stage_record import describe_stage
from compression.surgery import shrink

TRAIN = "--data_dir {world} --models_dir {world}/models --train_fraction 1"
LLM = "--base_model {world}/llm --data_dir {world} --dtype float32 --eval_samples 2"
CALIBRATION = "--num_samples 2 --repair_samples 4 --held_out_samples 1"
REPAIRED, DEFAULT, WHOLE = "GQA-aware, Taylor, repaired", "H-GSP, default", "whole layers, by removal perplexity"
# Benchmark -> its flags, values of a flag that have spaces in them, and what must hold of its JSON file.
CASES = {
    # The methods that need nothing but the project's own packages.
    "classifier_pruning_methods": (
        "--teacher_path {world}/models/teacher_model --data_dir {world} --ratios 0.5 --num_epochs 1 --scored_rows 20 "
        "--throughput_repeats 1 --methods ours small_scratch small_layers uniform_magnitude kwon",
        [],
        lambda found: (
            " ".join(row["method"] for row in found["rows"]) == "ours small_scratch small_layers uniform_magnitude kwon"
            and all(0.45 < row["share"] <= 0.5 and len(row["hits"]) == 60 for row in found["rows"])
            and len(found["throughput"]) == 6
        ),
    ),
    "distillation_memory": (
        "--windows 2 --length 96 --layers 1",
        ["--ways", "blocks"],
        lambda found: len(found["steps"]) == 4 and all(step["bytes_above_the_models"] > 0 for step in found["steps"]),
    ),
    "families": (
        "--families qwen3 --checks masked_is_smaller",
        [],
        lambda found: found["outcomes"]["decoders"] == {"qwen3": {"masked_is_smaller": "passed"}},
    ),
    "gqa_motivation": (
        f"{LLM} {CALIBRATION} --results_dir {{out}} --sequence_length 16 --analysis_samples 1 --analysis_length 16 "
        "--eval_length 16 --finetune_samples 4",
        ["--methods", REPAIRED],
        lambda found: 0.15 < found["perplexity"][REPAIRED]["removed"] < 0.25,
    ),
    "gguf_engines": (
        "--models {world}/bytes {world}/bytes_pruned --data_dir {world} --precisions f32 q8_0 --fast",
        [],
        lambda found: (
            [row["precision"] for row in found["perplexity"]] == ["f32", "q8_0"] * 2
            and all(abs(row["difference"]) < 1e-3 for row in found["perplexity"] if row["precision"] == "f32")
            and [row["decode"]["predicted"] == 1 for row in found["speed"]] == [True, True, False, False]
            and all(row["prefill"]["predicted"] > 1.2 for row in found["speed"][2:])
            and all(row["decode"]["tokens_per_second"] > 0 for row in found["speed"])
        ),
    ),
    "importance_memory": (
        "--base_model {world}/llm --length 16 --dtype float32",
        ["--ways", "fisher", "Taylor, all gradients kept"],
        lambda found: len(found["ways"]) == 2,
    ),
    "integrity_cost": (
        "--data_dir {world} --teacher {world}/bert --student {world}/distilbert --work_dir {out}/work",
        [],
        lambda found: len(found["stages"]) == 10 and all(seconds > 0 for seconds in found["seconds"].values()),
    ),
    "kill_and_resume": (
        f"{TRAIN} --kills 1",
        [],
        lambda found: found["kills"][0]["same"] == dict(metrics=True, history=True, weights=True),
    ),
    "large_model": (
        "--shape tiny --offload none disk --length 64 --num_samples 2 --repair_samples 4 --interval 0.01",
        [],
        lambda found: (
            set(found["runs"]) == {"--offload none on auto", "--offload disk on auto"}
            and all(
                {"scores", "budget"} <= {phase["phase"] for phase in run["pruning"]["phases"]}
                and max(phase["peak_rss_bytes"] or 0 for phase in run["pruning"]["phases"]) > 10**8
                and abs(run["model"]["reduction"]["structures"] - 0.5) < 0.02
                and run["forward"]["perplexity"] > 1
                for run in found["runs"].values()
            )
        ),
    ),
    "layer_times": (
        "--base_model {world}/llm --dtype float32 --hardware_length 16",
        [],
        lambda found: (
            all(list(parts["attention"]) == ["1", "2", "3", "4"] for parts in found["parts"].values())
            and list(found["parts"]) == list(found["rest"]) == ["prefill", "decode"]
        ),
    ),
    "last_words": (
        "--data_dir {world}/passages --passages 5 --dtype float32 --models {world}/llm {world}/llm",
        [],
        lambda found: (
            [row["task"] for row in found["rows"]] == ["hellaswag", "boolq", "winogrande", "piqa"] * 2
            and all(row["passages"] == 5 and row["perplexity"] > 1 for row in found["rows"])
            and all(row["difference"] == row["standard_error"] == 0 for row in found["rows"])
        ),
    ),
    "llm_pruning_methods": (
        f"{LLM} {CALIBRATION} --ratios 0.3 --length 16 --unseen none --zeroshot_tasks none",
        ["--methods", DEFAULT, WHOLE],
        lambda found: (
            [row["method"] for row in found["rows"]] == [DEFAULT, WHOLE]
            and all(0.3 <= row["removed"] < 0.35 and row["pruned"]["perplexity"]["ptb"] > 1 for row in found["rows"])
        ),
    ),
    "load_elsewhere": (
        "--checkpoint {world}/models/pruned --data_dir {world}",
        [],
        lambda found: found["inside_against_outside"] < 1e-6,
    ),
    "onnx_engines": (
        "--models {world}/models/pruned --quantized {world}/models/pruned_quantized --data_dir {world} "
        "--max_length 16 --calibration 8 --latency_repeats 2 --throughput_repeats 2 --batch_size 4",
        ["--precisions", "fp32", "int8"],
        lambda found: (
            [row["engine"] for row in found["rows"]] == ["PyTorch", "ORT fp32", "ORT int8", "PyTorch", "ORT nf4"]
            and all(row["largest_logit_difference"] < 1e-5 for row in found["rows"] if "int8" not in row["engine"])
            and found["rows"][1]["throughput_speed_up_on_fp32"] == 1
        ),
    ),
    "pruning_overhead": (
        "--student_path {world}/models/student_model --models student --rounds 2 --batch_size 2",
        [],
        lambda found: found["results"]["student"]["structures"] == {"heads": 12, "neurons": 144},
    ),
    "qat_step": (
        "--model_path {world}/models/pruned --rounds 2",
        [],
        lambda found: len(found["steps"]) == 4 and found["steps"]["plain"]["ratio_to_plain"] == 1,
    ),
    "removal_analysis": (
        "--base_model {world}/llm --data_dir {world} --length 16 --rounds 1",
        [],
        lambda found: found["largest_relative_difference"] < 1e-5,
    ),
    "repair_ways": (
        "--base_model {world}/llm --data_dir {world} --dtype float32 --length 16 --fast",
        [],
        lambda found: (
            len(found["ways"]) == 5
            and found["ways"]["each layer for itself"]["time_by_the_first"] == 1
            and all(0.5 < way["perplexity_by_dense"] < 2 and way["seconds"] > 0 for way in found["ways"].values())
            and all(way["bytes_above_the_model"] > 0 for way in found["ways"].values())
        ),
    ),
    "search_steps": (
        "--base_model {world}/llm --data_dir {world} --dtype float32 --length 16 --steps 8 --fast",
        [],
        lambda found: len(found["rows"]) == 8 and found["correlation"] > 0.5 and found["ratio"] > 0,
    ),
    "study_workers": (
        "--script {world}/fake.py --storages journal sqlite --seeds 1 --no_timed --fixed layers=2",
        ["--grid", "size=0.1,0.2,0.3,0.4"],
        lambda found: all(
            storage == {"runs": 4, "starts": [1, 1, 1, 2], "taken_up_again": 1, "twice": False}
            for storage in found["killed"].values()
        ),
    ),
    "streamed_pruning": (
        "--base_model {world}/llm --data_dir {world} --length 16 --dtype float32",
        ["--ways", "memory", "disk"],
        lambda found: (
            found["ways"]["disk"]["structures_that_differ"] == 0
            and found["ways"]["disk"]["largest_weight_difference"] < 1e-3
        ),
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """Tiny models and texts where benchmarks look for the real ones."""
    world = tmp_path_factory.mktemp("world")
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{WORDS[index % 26]} a b{' c' * (index % 9)}\t{index % 2}" for index in range(60)]
        (world / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for name in ("wikitext2/wiki.train.raw", "wikitext2/wiki.valid.raw", "wikitext2/wiki.test.raw", "ptb/ptb.test.txt"):
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_text(letters(1500))
    (world / "fake.py").write_text(SCRIPT)
    longs = [letters(70, seed) for seed in range(6)]
    shorts = [letters(5, seed) for seed in range(10, 16)]
    passages = {
        "hellaswag": [dict(query=long, choices=["a b", "x"], gold=0) for long in longs],
        "boolq": [dict(passage=long) for long in longs],
        "winogrande": [dict(sentence=f"{short} _ c d", option1="a", option2="b", answer="2") for short in shorts],
        "piqa": [dict(goal=short, sol1="a b", sol2="c d", label=1) for short in shorts],
    }
    for task, rows in passages.items():
        write_zero_shot(world / "passages", task, *rows)
    save_decoder(world / "llm", tiny_decoder(max_position_embeddings=512, num_hidden_layers=6, attention_bias=False))
    for name, kept in (("bytes", 64), ("bytes_pruned", 32)):
        model = tiny_decoder(vocab_size=340, intermediate_size=kept, max_position_embeddings=128)
        save_decoder(world / name, model, tokenizer=bytes_tokenizer())
    pruned = shrink(tiny_distilbert(), KEPT)
    metrics = {"logit_difference": 0.0}
    for name, model in (
        ("teacher_model", tiny_bert(max_position_embeddings=128)),
        ("student_model", tiny_distilbert()),
        ("pruned", pruned),
    ):
        stage = describe_stage(name.removesuffix("_model"), {}, {}, metrics, {"name": "x"})
        save_checkpoint(world / "models" / name, model, tokenizer, stage)
    packed = pack(pruned, Format(), torch.float32)
    save_checkpoint(world / "models" / "pruned_quantized", packed, tokenizer, {"stage": "pruned_quantized"})
    for name, make in (("bert", tiny_bert), ("distilbert", tiny_distilbert)):
        model = make(max_position_embeddings=128)
        model.base_model.save_pretrained(world / name)
        tokenizer.save_pretrained(world / name)
    return world


class Started:
    """Stands in for subprocess.Popen of a script of the project."""

    def __init__(self, command):
        self.running = start_script(*command[1:])
        self.pid = self.running.pid

    @property
    def stdout(self):
        """Lines as they come."""
        taken, running = 0, True
        while running:
            running = self.running.process.exitcode is None
            *lines, _ = self.running.said[taken:].split("\n")
            yield from (f"{line}\n" for line in lines)
            taken += sum(len(line) + 1 for line in lines)
            time.sleep(0.01)

    def send_signal(self, number):
        os.kill(self.running.pid, number)

    def poll(self):
        return self.running.process.exitcode

    def kill(self):
        self.running.process.kill()

    def wait(self, timeout=None):
        self.running.process.join(timeout)
        if self.running.process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout)
        return self.running.process.exitcode


@pytest.fixture
def quick_processes(monkeypatch):
    """Scripts that benchmarks start as commands run in this process, or in one that skips the imports."""
    run, start, forks = subprocess.run, subprocess.Popen, multiprocessing.get_context("forkserver")

    def is_script(command):
        return command[0] == sys.executable and command[1].endswith(".py")

    def run_here(command, **options):
        return run_script(*command[1:]) if is_script(command) else run(command, **options)

    def start_quickly(command, **options):
        return Started(command) if is_script(command) else start(command, **options)

    monkeypatch.setattr("subprocess.run", run_here)
    monkeypatch.setattr("subprocess.Popen", start_quickly)
    monkeypatch.setattr("multiprocessing.get_context", lambda _: forks)


@pytest.mark.parametrize("name", sorted(CASES))
def test_benchmark_runs_and_writes_what_it_measures(name, world, tmp_path, monkeypatch, quick_processes):
    monkeypatch.setattr("compression.runtime.RESULTS", tmp_path)
    monkeypatch.setenv("FAKE_SLEEP", "1")
    flags, more, holds = CASES[name]
    run_script(f"benchmarks/{name}.py", *flags.format(world=world, out=tmp_path).split(), *more)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert holds(found), found


def test_last_words_gives_the_passages_that_it_does_not_measure(world, tmp_path):
    passages = {}
    for count in (4, 6):
        out = tmp_path / f"{count}.txt"
        run_script("benchmarks/last_words.py", "--data_dir", world / "passages", "--passages", count, "--others", out)
        passages[count] = out.read_text().split("\n\n")
    assert len(passages[4]) == len(set(passages[4])) == 4 * (6 - 4)
    assert any(len(text.split()) > 61 for text in passages[4]) and any(text.endswith(" c d") for text in passages[4])
    assert passages[6] == ["\n"]  # all are measured
    there = "--data_dir", world / "passages", "--others", tmp_path / "4.txt"
    assert "4.txt: is there already" in run_script("benchmarks/last_words.py", *there, expect=2).stderr
    assert (tmp_path / "4.txt").read_text().split("\n\n") == passages[4]


def test_attack_holds_in_one_case(tmp_path):
    flags = ["--sections", "damage", "--limit", 1, "--jobs", 1, "--results_dir", tmp_path]
    start_script("benchmarks/faults.py", *flags).wait().check()
    total = json.loads((tmp_path / "faults.json").read_text())["total"]
    assert (total["tried"], total["held"], total["broken"]) == (1, 1, 0)


def test_no_benchmark_is_left_out():
    # What sharded_recovery starts takes a minute to import alone; tests/test_sharding.py does the same.
    elsewhere = {"faults", "on_gpu", "sharded_recovery"}
    assert {path.stem for path in Path(ROOT, "benchmarks").glob("*.py")} == {*CASES, *elsewhere}
