"""Pruning by other libraries, as their own examples drive them; each cuts a BERT down in place.

Torch-Pruning 1.6.1 (examples/transformers/prune_hf_bert.py and its scripts for vision transformers): importance of
coupled channels by weight times gradient (Taylor), heads as a whole and neurons, ranked over all layers. It takes a
ratio for each; here the same, the least one to a thousandth that reaches the budget. A layer that would lose all its
heads is left whole by it, so heads have at most the ratio at which each layer keeps some. Where the budget is out of
reach so, layers are ranked apart.

ModelOpt 0.39.0 (`mtp.prune(mode="gradnas")`, its way for BERT, which later versions do not have): the squared gradient
of masks on heads and neurons, one limit on the loss of every layer's part, found within the budget of FLOPs. Two things
are other than there, since it was made for transformers 4: the mask of heads acts on what goes into the attention's
output projection, as attention takes no mask of heads any more (the products are the same); and a layer's forward pass
is one without arguments that a classifier does not use, for else it cannot be traced and no FFN is pruned.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer

from classifier_pruning_methods.ground import SEQUENCE_LENGTH, Ground, as_pruned, macs_of
from compression.runtime import UserError, first_line
from compression.structures import layers_of

# ModelOpt's choices of a width. Its default has steps of a twentieth and none under 96 neurons, too many for 5 %.
WIDTHS = {"features_ratio": tuple(0.02 * step for step in range(1, 51)), "feature_divisor": 8}
# Parts of one in which Torch-Pruning's ratios are tried.
STEPS = 1000


def torch_pruning(ground: Ground, macs: int) -> PreTrainedModel:
    """Torch-Pruning at the least of its own ratios that reaches the budget."""
    gradients, heads = taylor_gradients(ground), sum(parts.heads for parts in layers_of(ground.teacher))

    def cut(step: int, most_heads: int = STEPS, everywhere: bool = True) -> PreTrainedModel:
        ratios = step / STEPS, min(step, most_heads) / STEPS
        return cut_by_torch_pruning(ground.load(), gradients, *ratios, everywhere)

    def whole_layer(model: PreTrainedModel, step: int) -> bool:
        return sum(parts.heads for parts in layers_of(model)) > math.ceil(heads * (1 - step / STEPS))

    def fits(model: PreTrainedModel, _: int) -> bool:
        return macs_of(model) <= macs

    too_many, _ = least(cut, whole_layer)
    for way in (partial(cut, most_heads=too_many - 1), partial(cut, everywhere=False)):
        _, small = least(way, fits)
        if small is not None:
            return as_pruned(small)
    raise UserError("Torch-Pruning reaches so few MACs at no ratio")


def least(
    cut: Callable[[int], PreTrainedModel], holds: Callable[[PreTrainedModel, int], bool]
) -> tuple[int, PreTrainedModel | None]:
    """The least step from which on something holds, by bisection, and the model there; None where it never does."""
    low, high, found = 0, STEPS, None
    while high - low > 1:
        middle = (low + high) // 2
        tried = cut(middle)
        if holds(tried, middle):
            high, found = middle, tried
        else:
            low = middle
    return high, found


def taylor_gradients(ground: Ground) -> dict[str, Tensor]:
    """Gradients of the loss summed over the rows, by parameter."""
    model = ground.load()
    for inputs, labels in ground.batches(model):
        nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def cut_by_torch_pruning(
    model: PreTrainedModel, gradients: dict[str, Tensor], ratio: float, head_ratio: float, everywhere: bool
) -> PreTrainedModel:
    """One call of Torch-Pruning.

    Args:
        everywhere: rank the structures of all layers together, else each layer's apart.
    """
    import torch_pruning as tp

    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    layers, count = model.bert.encoder.layer, model.config.num_attention_heads
    attentions = [layer.attention.self for layer in layers]
    # Nothing that is as wide as the hidden state.
    fixed = [module for layer in layers for module in (layer.attention.output.dense, layer.output.dense)]
    ids = torch.ones(1, 4, dtype=torch.long, device=model.device)
    pruner = tp.pruner.BasePruner(
        model,
        {"input_ids": ids, "attention_mask": ids},
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=everywhere,
        pruning_ratio=ratio,
        ignored_layers=[model.bert.embeddings, model.bert.pooler, model.classifier, *fixed],
        num_heads={part: count for each in attentions for part in (each.query, each.key, each.value)},
        prune_num_heads=True,
        prune_head_dims=False,
        # Of a layer that is ranked apart one head stays.
        head_pruning_ratio=min(head_ratio, (count - 1 - 1e-6) / count),
        output_transform=lambda output: output.logits.sum(),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    return model


def modelopt(ground: Ground, macs: int) -> PreTrainedModel:
    """ModelOpt's gradient search at a budget of FLOPs."""
    import modelopt.torch.prune as mtp

    model = ground.load()
    model.set_attn_implementation("eager")
    ids = torch.ones(1, SEQUENCE_LENGTH, dtype=torch.long, device=model.device)
    # Its FLOPs are the whole model's, of which the head stays: the encoder has at most this share then.
    share = f"{100 * macs / macs_of(model):.4f}%"
    rows = list(ground.batches(model))
    search = {
        "data_loader": rows,
        "max_iter_data_loader": len(rows),
        "collect_func": lambda batch: batch[0],
        "loss_func": lambda output, batch: nn.functional.cross_entropy(output.logits, batch[1]),
    }
    with for_transformers_5(), redirect_stdout(StringIO()):
        try:
            mtp.prune(model, [("gradnas", {"nn.Linear": {"*": WIDTHS}})], {"flops": share}, (ids, ids), search)
        except ValueError as error:
            raise UserError(f"ModelOpt: {first_line(error)}") from error
    return as_pruned(model)


@contextmanager
def for_transformers_5() -> Iterator[None]:
    """What ModelOpt 0.39.0 needs to prune a BERT of transformers 5; see above."""
    from modelopt.torch.prune import gradnas

    def mask_heads(attention: Any) -> tuple[Any, Any]:
        heads = attention.get_hparam("num_attention_heads").max
        manager = gradnas.GradientDataManager((heads, 1), attention, reduce_func=lambda score: score.squeeze(-1))

        def scale(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return ((inputs[0].unflatten(-1, (heads, -1)) * manager.mask).flatten(-2),)

        return manager, attention.output.dense.register_forward_pre_hook(scale)

    with (
        patch.object(gradnas, "_setup_grad_manager_bert_attention", mask_heads),
        patch.object(BertLayer, "forward", plain),
    ):
        yield


def plain(
    self: BertLayer,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: None = None,
    encoder_attention_mask: None = None,
    past_key_values: None = None,
    position_ids: None = None,
) -> Tensor:
    """A layer's forward pass in a classifier: attention, then FFN."""
    attended = self.attention(hidden_states, attention_mask)[0]
    return self.output(self.intermediate(attended), attended)
