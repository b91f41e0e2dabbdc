"""Parts of benchmarks/large_model.py; the whole of it runs in test_benchmarks.py."""

import os
import runpy
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from scripts import ROOT, run_script

from compression.checkpoint import load_language_model
from compression.llm.memory import Shape
from compression.llm.perplexity import perplexity
from compression.runtime import UserError

sys.path.append(str(ROOT / "benchmarks"))
from large_model import random_model, watch

MB = 10**6


@pytest.mark.parametrize("tied", [True, False])
def test_random_model_is_an_ordinary_checkpoint_in_shards(tmp_path, tied):
    shape = Shape(32, 2, 4, 2, 64, tied=tied, vocabulary=90, positions=128)
    folder = random_model.save_random_model(tmp_path / "model", shape, 8000, 0, {"stage": "random_model"})
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, tokenizer = load_language_model(folder, dtype=torch.bfloat16)
    assert model.config.tie_word_embeddings == tied and model.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in model.parameters() if weight.dim() > 1) == shape.weights
    ids = tokenizer(random_model.random_text(shape.vocabulary, 64, 0), return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 64) and 4 <= ids.min() and ids.max() < shape.vocabulary
    assert perplexity(model, ids) == pytest.approx(shape.vocabulary, rel=0.1)


def test_phases_are_those_that_the_log_names_and_each_has_its_peak():
    watched = watch.Watch(1.0)
    for line in ("Device: cpu", "12:00:01 Phase: scores", "Phase: repair and surgery\n"):
        watched.read(line)
    assert [name for name, _ in watched.phases] == [watch.START, "scores", "repair and surgery"]
    watched.phases = [(name, float(place)) for place, (name, _) in enumerate(watched.phases)]
    kinds = (*watch.STATUS, "device")
    watched.samples = [{"seconds": at} | dict.fromkeys(kinds, size) for at, size in ((0.5, 3), (1.2, 9), (1.8, 5))]
    rows = watch.peaks(watched, 4.0)
    assert [(row["phase"], row["seconds"], row["peak_rss_bytes"]) for row in rows] == [
        ("start", 1.0, 3),
        ("scores", 1.0, 9),
        ("repair and surgery", 2.0, None),
    ]


def test_memory_is_that_of_the_process_and_its_children():
    mine = watch.resident_bytes(os.getpid())
    assert mine["rss"] == pytest.approx(mine["anonymous"] + mine["file"] + mine["shared"], rel=0.02)
    program = "import sys; held = b'x' * 10**8; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        both = watch.resident_bytes(os.getpid())
        child.stdin.close()
    assert 90 * MB < both["anonymous"] - mine["anonymous"] < 150 * MB
    assert watch.resident_bytes(child.pid) == dict.fromkeys(watch.STATUS, 0)


def test_of_a_long_curve_the_peak_stays():
    samples = [{"seconds": place, "rss": 100 if place == 577 else 1} for place in range(1000)]
    thin = watch.thinned(samples, 40)
    assert len(thin) == 40 and max(sample["rss"] for sample in thin) == 100
    assert watch.thinned([], 40) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(10**9))
    flags = ["--shape", "Llama-3-8B", "--results_dir", tmp_path / "new"]
    err = run_script("benchmarks/large_model.py", *flags, expect=2).stderr
    assert err.startswith("error: --results_dir") and "has 1.0 GB free, allowed is at least" in err
    assert len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_pruning_run_is_watched_and_one_that_fails_ends_in_its_last_line():
    program = "import time; print('Phase: scores', flush=True); time.sleep(0.3); print('error: no good'); exit({})"
    found = watch.run_watched([sys.executable, "-c", program.format(0)], 0.01)
    assert [phase["phase"] for phase in found["phases"]] == ["start", "scores"]
    assert 10 * MB > found["phases"][1]["peak_anonymous_bytes"] > 0.5 * MB and found["phases"][1]["seconds"] > 0.2
    with pytest.raises(UserError, match="ended with status 3: error: no good"):
        watch.run_watched([sys.executable, "-c", program.format(3)], 0.01)


def test_what_a_failed_run_leaves_is_removed(tmp_path):
    names = runpy.run_path(str(ROOT / "benchmarks" / "large_model.py"))
    config = names["LargeModelConfig"].make(results_dir=tmp_path)
    states = config.folder / ".pruned_none_auto_0123.resume" / "states"
    states.mkdir(parents=True)
    (config.folder / "text.txt").touch()
    names["clean_up"](config)
    assert not list(tmp_path.iterdir())
