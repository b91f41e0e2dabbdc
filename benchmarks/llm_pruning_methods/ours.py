"""Ways that this project's own pruner goes: H-GSP and its parts, peers that are its settings among them.

- Local OBS: every layer keeps as many groups and channels, and within a layer they go in rounds by what the others
  cannot make up for, the rest fitted anew after each, as in ZipLM (Kurtic et al. 2023, arXiv:2302.04089) and OSSCAR
  (Meng et al. 2024, arXiv:2406.12972). How many groups and how many channels is chosen by perplexity on held-out text,
  before any repair; ZipLM's own allocation is by latency.
- Tyr's recipe (Li et al. 2025, "Tyr-the-Pruner", arXiv:2503.09657): local OBS at a handful of sizes of each attention
  and MLP, on what the pruned layers before give, and from uniform sizes an evolutionary search over these by KL to the
  dense model. Other than there: sizes are pruned once, not anew and closer together around what a first search found.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from compression.config import pick
from compression.importance import RIDGE
from compression.llm.global_pruning import Budget, GlobalPruning, Scoring
from compression.llm.removal import removal_perplexities
from compression.llm.scoring import SCORES
from llm_pruning_methods.ground import Ground
from run_global_pruning import GlobalPruningConfig

DEFAULT_SCORE = GlobalPruningConfig().importance_method
PLAIN = dict(compensation="none", epsilon=0.0, round_to=1)
PAPER = GlobalPruningConfig.presets["paper"]
# Rounds of local removal.
ROUNDS = 32
LOCAL_OBS = dict(uniform=True, removal_steps=ROUNDS, local_choice="obs", round_to=1, error_share=0.0, ridge=RIDGE)
# Name -> the fields in which the method differs from the defaults.
METHODS: dict[str, dict[str, Any]] = {
    "H-GSP, default": {},
    "H-GSP, text loss": dict(score_loss="text"),
    "H-GSP, removal steps": dict(removal_steps=ROUNDS),
    "H-GSP, search": dict(search="exchange"),
    "H-GSP, two steps": dict(iterative_steps=2),
    "H-GSP, gates and ups repaired": dict(mlp_rounds=1),
    "H-GSP, each layer for itself": dict(error_share=0.0),
    "H-GSP, no repair": dict(compensation="none"),
    **{f"H-GSP, {score} scores": dict(importance_method=score) for score in SCORES if score != DEFAULT_SCORE},
    "H-GSP, obs scores, no repair": dict(importance_method="obs", compensation="none"),
    "H-GSP, paper": PAPER,
    "H-GSP, paper, T = 0": PAPER | {"temperature": 0.0},
    "uniform Taylor on MLP, ends protected": PLAIN
    | dict(importance_method="taylor", normalize="layer", attention_factors=(1e9,), protect_first=2, protect_last=2),
    "magnitude, per layer": PLAIN | dict(importance_method="magnitude", normalize="layer"),
    "Wanda-sp, per layer": PLAIN | dict(importance_method="wanda", normalize="layer"),
    "local OBS, uniform": LOCAL_OBS,
    "Tyr's recipe": LOCAL_OBS | dict(search="evolutionary"),
}


def by_fields(ground: Ground, ratio: float, fields: dict[str, Any]) -> PreTrainedModel:
    """Prune by the project's own machinery; what it computes of the dense model is computed once for each way.

    Args:
        fields: settings of run_global_pruning.py. `uniform` goes with a search here, which starts from these sizes.
    """
    told = {name: value for name, value in fields.items() if name != "uniform"}
    config = GlobalPruningConfig.make(pruning_ratio=ratio, **ground.search | told)
    scoring, budget = pick(Scoring, config), replace(pick(Budget, config), uniform=fields.get("uniform", False))
    model = ground.load()
    removal = None
    if config.temperature:
        removal = ground.once("removal", lambda: removal_perplexities(model, ground.text.held_out))

    def cached(name: str, make: Any) -> Any:
        if name == "labels":
            return ground.once(name, make)
        if name.startswith("scores_of_step_1_"):
            return ground.once(f"{config.importance_method} scores by {scoring.loss}", make)
        return make()

    return GlobalPruning(model, scoring, budget, ground.text, removal, cached, search=config.allocation_search).prune()
