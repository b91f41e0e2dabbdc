"""Torch-Pruning, driven as in its own examples/LLMs/prune_llm.py.

Norms of coupled channels, every layer alike, the hidden size is pruned too. It takes one ratio for hidden size, heads
and channels; here the least one that reaches the budget. Two things are other than there: attention is the eager one,
and while the graph is traced there are no rotary embeddings. They move no channel, but with them the search for coupled
channels never ends (known upstream: github.com/VainF/Torch-Pruning/issues/527).
"""

from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from llm_pruning_methods.ground import Ground, layer_parameters


def torch_pruning(ground: Ground, ratio: float) -> PreTrainedModel:
    """Torch-Pruning's recipe at the least of its own ratios, to a thousandth, that removes the share."""
    budget = (1 - ratio) * layer_parameters(ground.load())
    low, high, small = 0, 1000, None
    while high - low > 1:
        middle = (low + high) // 2
        tried = pruned_by_recipe(ground.load(), middle / 1000)
        if layer_parameters(tried) <= budget:
            high, small = middle, tried
        else:
            low = middle
    return small


def pruned_by_recipe(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """One call of Torch-Pruning, as its script for language models makes it."""
    import torch_pruning as tp

    model.config.use_cache = False
    model.set_attn_implementation("eager")
    config, heads = model.config, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    with patch(f"{type(model).__module__}.apply_rotary_pos_emb", lambda query, key, *_, **__: (query, key)):
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=torch.ones(1, 4, dtype=torch.long, device=model.device),
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=[model.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
            round_to=4,
            output_transform=lambda output: output.logits,
        )
        for group in pruner.step(interactive=True):
            group.prune()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    return model
