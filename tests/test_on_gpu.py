"""Everything that only a GPU can show, rehearsed: every part runs, leaves what it found, and fails alone."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Named

import pytest
import torch
from scripts import ROOT, run_script
from test_benchmarks import quick_processes  # noqa: F401 (a fixture)

from compression.runtime import UserError

SCRIPT = "benchmarks/on_gpu.py"


@pytest.fixture
def on_gpu(monkeypatch):
    """The script's names."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return runpy.run_path(str(ROOT / SCRIPT))


def test_rehearsal_runs_every_part_and_a_rerun_none(tmp_path, quick_processes, on_gpu):  # noqa: F811
    flags = ["--rehearse", "--results_dir", tmp_path]
    run_script(SCRIPT, *flags)
    found = json.loads((tmp_path / "on_gpu_rehearsal.json").read_text())["parts"]
    assert found.keys() == on_gpu["PARTS"].keys()
    table = (tmp_path / "on_gpu_rehearsal.md").read_text()
    for part, outcome in found.items():
        assert outcome["figures"] and f"| {part} | " in table
    assert found["stage9"]["figures"]["stored values that differ between CPU and device"] == 0
    assert found["stage10"]["figures"]["matrices"] == 12
    large = found["large_streamed"]["figures"]
    assert large["layers with the sizes that they have when pruned in memory"] == large["layers"] == 4
    if find_spec("vllm") is None:
        assert found["vllm"]["figures"] == {"not run": "vLLM is not installed"}
    second = json.loads((tmp_path / "on_gpu_rehearsal" / "large_disk.json").read_text())
    assert second["seconds_to_make_the_dense_model"] is None, "both runs start from one model"
    assert (tmp_path / "on_gpu_rehearsal" / "large_disk.png").is_file()
    assert "torch 2." in table and "transformers 5." in table
    assert not (tmp_path / "on_gpu_rehearsal" / "work").exists()
    again = run_script(SCRIPT, *flags).stdout
    assert again.count("there already") == len(found)


def test_served_model_is_compared_with_the_one_in_transformers(tmp_path, quick_processes, on_gpu, monkeypatch):  # noqa: F811
    """With a stand-in for vLLM that answers as transformers does, but for one token."""
    serving = on_gpu["serving"]

    class LLM:
        def __init__(self, model, **options):
            assert (options["trust_remote_code"], options["model_impl"]) == (True, "transformers")
            self.folder = Path(model)
            layers = json.loads((self.folder / "config.json").read_text())["per_layer_config"]
            assert not any("attention" in layer.get("skip", ()) for layer in layers.values())

        def generate(self, prompts, wanted):
            ids = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts])
            answers = serving.from_transformers(self.folder, ids)
            answers[0][0][3] += 1
            for row, (tokens, logprobs) in zip(ids.tolist(), answers, strict=True):
                known = [{token: Named(logprob=value)} for token, value in zip(row[1:], logprobs, strict=True)]
                outputs = [Named(token_ids=tokens)]
                yield Named(prompt_token_ids=row, prompt_logprobs=[None, *known], outputs=outputs)

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, Named
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(serving, "find_spec", lambda _: True)
    figures = serving.vllm(on_gpu["OnGpuConfig"].make(rehearse=True, results_dir=tmp_path).setting())
    assert (figures["prompts"], figures["continuations alike to the last token"]) == (8, 7)
    assert figures["tokens until the first that differs, mean"] == (3 + 7 * 16) / 8
    assert figures["log-probabilities of the prompts' tokens, largest difference"] == 0


def test_parts_are_listed_and_unknown_ones_refused(tmp_path, on_gpu):
    listed = run_script(SCRIPT, "--list").stdout
    assert all(f"{name} " in listed for name in on_gpu["PARTS"])
    assert "--part nothing: unknown" in run_script(SCRIPT, "--part", "nothing", expect=2).stderr
    given = ["--teacher_path", tmp_path]
    assert "give all" in run_script(SCRIPT, *given, expect=2).stderr


@pytest.fixture
def parts(on_gpu, monkeypatch):
    """Three quick parts, of which one fails and one takes too long."""

    def endless(_):
        while True:
            pass

    def wrong(_):
        raise ValueError("no such\nkernel")

    quick = {name: on_gpu["Part"](name, run) for name, run in (("a", wrong), ("b", endless))}
    quick["c"] = on_gpu["Part"]("c", lambda _: {"speed, ms": 0.123456, "tokens": 1234})
    monkeypatch.setitem(on_gpu["main"].__globals__, "PARTS", quick)
    return on_gpu


def test_a_part_that_fails_or_takes_too_long_ends_no_other(parts, tmp_path):
    config = parts["OnGpuConfig"].make(rehearse=True, results_dir=tmp_path, minutes=0.01)
    with pytest.raises(UserError, match="a, b failed; see .*, and run again"):
        parts["main"](config)
    found = json.loads((tmp_path / "on_gpu_rehearsal.json").read_text())["parts"]
    assert found["a"]["failure"] == "ValueError: no such kernel"
    assert found["b"]["failure"] == "TimeoutError: it took more than 0.01 minutes"
    assert found["c"]["figures"] == {"speed, ms": 0.123456, "tokens": 1234}
    table = (tmp_path / "on_gpu_rehearsal.md").read_text()
    assert "| a | failed | ValueError: no such kernel |" in table
    assert "| c | speed, ms | 0.1235 |" in table and "| c | tokens | 1,234 |" in table


def test_a_process_that_leaves_nothing_is_a_failure_too(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: type("Ended", (), {"returncode": -11}))
    config = parts["OnGpuConfig"].make(results_dir=tmp_path)
    with pytest.raises(UserError, match="a, b, c failed"):
        parts["main"](config)
    assert json.loads((tmp_path / "on_gpu" / "a.json").read_text())["failure"] == "its process ended with status -11"
