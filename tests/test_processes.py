"""Pruning by several processes: the windows are shared, and the result is that of one process."""

import pytest
import torch
from conftest import leftovers, pruning_flags
from scripts import run_distributed, run_script

from compression.files import read_json
from compression.llm.scoring import SCORES
from compression.weights import Shards

METHODS = [method for method in sorted(SCORES) if SCORES[method].needs_text]
SCRIPTS = {
    # Perplexities of several choices, the removal analysis and two steps, each of which one process has less work for.
    "run_global_pruning.py": ["--attention_factors", "0.5", "2", "--temperature", "1", "--iterative_steps", "2"]
    + ["--removal_steps", "3", "--mlp_rounds", "1"],
    "gqa_aware_pruning.py": ["--protect_first", "0", "--protect_last", "0", "--mlp_rounds", "2"],
}
FLAGS = ["--pruning_ratio", "0.4", "--round_to", "8", "--num_samples", "5", "--repair_samples", "7"]


def compare(base, tmp_path, script, *flags):
    flags = [*pruning_flags(base, tmp_path), *FLAGS, *flags]
    run_script(script, *flags, "--output_name", "one")
    run_distributed(script, *flags, "--output_name", "two")
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "models" / "config.json").read_text() == (two / "models" / "config.json").read_text()
    weights = [Shards(folder / "models") for folder in (one, two)]
    expected, found = (shards.tensors(shards.shapes) for shards in weights)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    results = [read_json(folder / "evaluation" / "evaluation_results.json") for folder in (one, two)]
    for which in ("dense", "pruned"):
        mine, other = (result[which]["perplexity"] for result in results)
        assert mine == pytest.approx(other, rel=1e-4)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place", ["none", "disk"])
def test_two_processes_prune_as_one(base, tmp_path, script, place):
    compare(base, tmp_path, script, *SCRIPTS[script], "--offload", place)


def test_candidates_of_a_search_are_judged_together(base, tmp_path):
    few = ["--search_generations", "3", "--search_population", "4", "--search_tokens", "64", "--held_out_samples", "3"]
    compare(base, tmp_path, "run_global_pruning.py", "--search", "evolutionary", *few)


@pytest.mark.parametrize("method", METHODS)
def test_every_score_is_shared(base, tmp_path, method):
    compare(base, tmp_path, "run_global_pruning.py", "--importance_method", method)
