"""GQA-aware pruning of LLaMA-class models, layer by layer: query heads go only together with their key-value head.

Each layer loses a share of its parameters, its rate; layers whose removal costs much lose less. From the first layer to
the last, the gradients are those of the model as it is pruned so far (first-order Taylor importance, as in LLM-Pruner,
Ma et al. 2023, arXiv:2305.11627), and a layer is cut down before the next one is looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from compression.allocation import all_but_least, largest_ratio, split_budget, spread_rates
from compression.config import StageConfig
from compression.decoder import decoder_of
from compression.llm.layerwise import LayerStream
from compression.llm.repair import repair_layer
from compression.llm.scoring import ScoreName, score_layer
from compression.llm.text import CalibrationText
from compression.runtime import UserError, log
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, LayerParts, layers_of
from compression.surgery import shrink_layer, to_pruned

Cached = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


# The three steps for one layer, each usable alone.


def compute_gqa_group_importance(
    model: PreTrainedModel,
    layer: int,
    text: Tensor | LayerStream,
    method: ScoreName = "taylor",
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
) -> dict[str, Tensor]:
    """Importance of one layer's groups (key-value heads with their query heads) and of its MLP channels.

    With `taylor`, a group's is the sum of |w * dL/dw| over its rows of k and v, the rows of q of all its query
    heads, and their columns of o; an MLP channel's that over its rows of gate and up and its column of down. L is the
    mean loss of a batch; the scores are means over batches. No other layer's weights get a gradient.

    Args:
        layer: its index.
        text: token ids [count, length]; or `LayerStream`, standing before this layer, which has batches already.
        method: one of `scoring.SCORES`.

    Returns:
        groups: [groups], channels: [channels], both fp32.

    Raises:
        UserError: an architecture that is not supported.
    """
    decoder_of(model)
    if isinstance(text, Tensor):
        text = LayerStream(model, text, batch_size, layer)
    return score_layer(model, layer, text, method, gradient_checkpointing)


def select_gqa_groups_to_prune(importance: Tensor, count: int) -> Tensor:
    """The least important groups, of equally important ones the first.

    Args:
        importance: [groups]. MLP channels can be selected in the same way.
        count: how many go; at least one group has to stay.

    Returns:
        bool [groups], True where the group goes.

    Raises:
        ValueError: there are not so many groups.
    """
    if not 0 <= count < max(len(importance), 1):
        raise ValueError(f"{count} of {len(importance)} groups cannot go: at least one has to stay")
    return ~all_but_least(importance.cpu(), count)


def prune_attention_by_gqa_groups(model: PreTrainedModel, layer: int, pruned: Tensor) -> None:
    """Remove groups, key-value heads with their query heads, from one layer, in place; their ratio stays.

    The model computes on at once. Once all layers are done, `surgery.to_pruned` gives it a config that says how wide
    they are, so that it can be saved.

    Args:
        layer: its index.
        pruned: bool [groups], True where the group goes.

    Raises:
        ValueError: the layer has another number of groups, or none would stay.
    """
    _keep(model, layer, GROUPS, ~pruned)


def prune_mlp_channels(model: PreTrainedModel, layer: int, pruned: Tensor) -> None:
    """Remove MLP channels from one layer, in place: rows of gate and up, columns of down.

    Args:
        pruned: bool [channels], True where the channel goes.

    Raises:
        ValueError: the layer has another number of channels, or none would stay.
    """
    _keep(model, layer, CHANNELS, ~pruned)


def _keep(model: PreTrainedModel, layer: int, kind: str, kept: Tensor) -> None:
    parts = layers_of(model)[layer]
    if len(kept) != parts.count(kind):
        raise ValueError(f"layer {layer} has {parts.count(kind)} {kind}, not {len(kept)}")
    if len(kept) and not kept.any():
        raise ValueError(f"layer {layer}: at least one of its {kind} has to stay")
    if not kept.all():
        shrink_layer(parts, {kind: kept})


# Rates of the layers.


@dataclass
class GQAPruningFields(StageConfig):
    """What is pruned and how."""

    pruning_ratio: float = 0.2
    """Share of the parameters of the decoder layers (those of --layers) to remove."""
    layers: str = "all"
    """Which layers: all, one such as 12, or a range such as 10-14. Layers count from 0."""
    strategy: Literal["inverse", "uniform", "random"] = "inverse"
    """Rates of layers: in inverse proportion to what removing the layer adds to the loss, all the same, or random."""
    min_rate: float = 0.0
    """Every layer that is pruned loses at least this share."""
    max_rate: float = 0.8
    """No layer loses more than this share."""
    attention_ratio: float = 0.5
    """Attention loses this times its layer's rate, rounded to whole groups; the MLP makes up the rest of the budget."""
    round_to: int = 32
    """MLP widths are multiples of this, unless nothing is removed: matrix units are slow at odd widths."""
    importance_method: ScoreName = "taylor"
    """How structures are scored."""
    iterative_rounds: int = 1
    """The rates are reached in so many sweeps over all layers."""
    target_perplexity: float | None = None
    """Search the largest ratio whose perplexity on held-out text stays under this, instead of --pruning_ratio."""
    search_steps: int = 6
    """Trials of that search; each halves what is left of the range up to --max_rate."""
    protect_first: int = 2
    """So many layers at the start are left alone."""
    protect_last: int = 2
    """So many layers at the end are left alone."""
    compensation: Literal["none", "lstsq"] = "lstsq"
    """lstsq: solve the output projections anew so that what stays makes up for what goes."""

    def check(self) -> None:
        super().check()
        self.check_range("pruning_ratio", 0, 0.95)
        self.check_range("min_rate", 0, 0.95)
        self.check_range("max_rate", self.min_rate, 0.95)
        self.check_range("attention_ratio", 0, 10)
        for name in ("protect_first", "protect_last"):
            self.check_range(name, 0)
        for name in ("iterative_rounds", "search_steps", "round_to"):
            self.check_range(name, 1)
        if self.target_perplexity is not None:
            self.check_range("target_perplexity", 1)
        self.selected_layers(None)

    def selected_layers(self, depth: int | None) -> range:
        """The layers that --layers names, of a model with so many layers.

        Raises:
            UserError: it is not a layer or a range of layers, or goes beyond the model's.
        """
        if self.layers == "all":
            return range(depth or 0)
        first, _, last = self.layers.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)) or self.layers.endswith("-"):
            raise UserError(f"--layers {self.layers}: allowed is all, one layer such as 12, or a range such as 10-14")
        if depth is not None and int(last) >= depth:
            raise UserError(f"--layers {self.layers}: the model has {depth} layers; allowed are 0 to {depth - 1}")
        return range(int(first), int(last) + 1)


def layer_rates(
    config: GQAPruningFields, layers: list[LayerParts], ratio: float, removal: dict[str, Any] | None, seed: int
) -> list[float]:
    """The share of its parameters that each layer loses, 0 where it is left alone.

    Args:
        ratio: share of the parameters of the layers that --layers names.
        removal: see `removal.removal_perplexities`; needed for inverse rates.
        seed: of random rates.

    Raises:
        UserError: no rates within the bounds meet the ratio; says which do.
    """
    check_ratio(config, layers, ratio)
    pruned, weights, low, high = _bounds(config, layers)
    target = ratio * _selected_parameters(config, layers) / weights.sum().item()
    rates = spread_rates(_preference(config, removal, pruned, seed), weights, target, low, high)
    by_layer = dict(zip(pruned, rates.tolist(), strict=True))
    return [by_layer.get(index, 0.0) for index in range(len(layers))]


def check_ratio(config: GQAPruningFields, layers: list[LayerParts], ratio: float) -> None:
    """Raise UserError unless rates within their bounds can meet the ratio."""
    least, most = ratio_range(config, layers)
    if not least - 1e-9 <= ratio <= most + 1e-9:
        left_alone = len(layers) - len(prunable_layers(config, layers))
        raise UserError(
            f"--pruning_ratio {ratio:g}: with --min_rate {config.min_rate:g}, --max_rate {config.max_rate:g} and "
            f"{left_alone} of {len(layers)} layers left alone allowed is {least:.3f} to {most:.3f}; change one of "
            "these, --layers, --protect_first or --protect_last"
        )


def ratio_range(config: GQAPruningFields, layers: list[LayerParts]) -> tuple[float, float]:
    """The least and the largest ratio that rates within their bounds can meet."""
    _, weights, low, high = _bounds(config, layers)
    total = _selected_parameters(config, layers)
    return (low * weights).sum().item() / total, (high * weights).sum().item() / total


def _bounds(config: GQAPruningFields, layers: list[LayerParts]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """The layers that lose something, their parameters, the least and the largest rate of each."""
    pruned = prunable_layers(config, layers)
    weights = torch.tensor([layers[index].parameters for index in pruned], dtype=torch.double)
    high = torch.tensor([min(config.max_rate, _reachable(layers[index])) for index in pruned], dtype=torch.double)
    return pruned, weights, high.clamp_max(config.min_rate), high


def _selected_parameters(config: GQAPruningFields, layers: list[LayerParts]) -> int:
    return sum(layers[index].parameters for index in config.selected_layers(len(layers)))


def prunable_layers(config: GQAPruningFields, layers: list[LayerParts]) -> list[int]:
    """The layers that are to lose something.

    Raises:
        UserError: there are none.
    """
    depth = len(layers)
    ends = range(config.protect_first, depth - config.protect_last)
    pruned = [index for index in config.selected_layers(depth) if index in ends and layers[index].parameters]
    if not pruned:
        raise UserError(
            f"--layers {config.layers}: all of them are protected by --protect_first {config.protect_first} and "
            f"--protect_last {config.protect_last} (the model has {depth} layers); set these lower"
        )
    return pruned


def _reachable(parts: LayerParts) -> float:
    """The share of a layer that can go when one structure of each kind stays."""
    least = sum(parts.structure_parameters(kind) for kind in DECODER_KINDS)
    return 1 - least / parts.parameters


def _preference(config: GQAPruningFields, removal: dict[str, Any] | None, pruned: list[int], seed: int) -> Tensor:
    """What the rates of these layers are proportional to, within their bounds."""
    if config.strategy == "uniform":
        return torch.ones(len(pruned))
    if config.strategy == "random":
        return torch.rand(len(pruned), generator=torch.Generator().manual_seed(seed)).clamp_min(1e-3)
    # What removing a layer adds to the loss: a perplexity itself differs by orders of magnitude between layers.
    added = torch.tensor([removal["layer"][index] for index in pruned], dtype=torch.double).log()
    added -= torch.tensor(removal["dense"], dtype=torch.double).log()
    # A layer without which the model does no worse, or that decides all, still has a finite rate.
    return 1 / added.clamp(1e-3, 1e3)


# The sweep.


class LayerwisePruning:
    """One model on its way through the layers.

    Args:
        model: used up; `prune` returns the smaller one.
        rates: of each layer, the share of its parameters to remove.
        cached: given a name and a function that makes named tensors, gives these or what an earlier run made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rates: list[float],
        config: GQAPruningFields,
        text: CalibrationText,
        cached: Cached = lambda _, make: make(),
    ):
        self.model, self.rates, self.config, self.text, self.cached = model, rates, config, text, cached
        decoder_of(model)
        self.before = [(parts.groups, parts.channels, parts.parameters) for parts in layers_of(model)]

    def prune(self) -> PreTrainedModel:
        """Remove what the rates say, in as many sweeps as the configuration wants."""
        for round_ in range(1, self.config.iterative_rounds + 1):
            self._sweep(round_)
        self.model = to_pruned(self.model)
        return self.model

    def table(self) -> list[dict[str, Any]]:
        """What each layer was and is, a row per layer."""
        rows = []
        for index, (parts, (groups, channels, parameters)) in enumerate(
            zip(layers_of(self.model), self.before, strict=True)
        ):
            rows.append({
                "layer": index, "rate": self.rates[index], "removed": 1 - parts.parameters / max(parameters, 1),
                "groups_before": groups, "groups_after": parts.groups,
                "channels_before": channels, "channels_after": parts.channels,
                "parameters_before": parameters, "parameters_after": parts.parameters,
            })  # fmt: skip
        return rows

    def removed(self) -> float:
        """The share of the parameters of the layers that --layers names that is gone."""
        table = self.table()
        rows = [table[index] for index in self.config.selected_layers(len(table))]
        before, after = (sum(row[f"parameters_{when}"] for row in rows) for when in ("before", "after"))
        return 1 - after / before

    def _sweep(self, round_: int) -> None:
        """From the first layer to the last, so that the text goes through each layer once, when it is done with.

        Layers are cut to whole structures; what one removes too much, the next one removes less.
        """
        share = round_ / self.config.iterative_rounds
        scored = LayerStream(self.model, self.text.scores, self.text.batch_size)
        streams = [scored]
        if self.config.compensation == "lstsq":
            streams.append(LayerStream(self.model, self.text.repair, self.text.batch_size))
        due = 0.0
        last = max((index for index, rate in enumerate(self.rates) if rate), default=-1)
        for index in tqdm(range(last + 1), desc="layers", leave=False, disable=None):
            if self.rates[index]:
                left = layers_of(self.model)[index].parameters
                due += self.rates[index] * share * self.before[index][2] - (self.before[index][2] - left)
                self._prune_layer(index, due, round_, streams)
                due -= left - layers_of(self.model)[index].parameters
            for text in streams:
                text.advance()

    def _prune_layer(self, index: int, budget: float, round_: int, streams: list[LayerStream]) -> None:
        counts = self._counts(layers_of(self.model)[index], index, budget, round_ / self.config.iterative_rounds)
        if not any(counts.values()):
            return
        scores = self.cached(
            f"scores_of_round_{round_}_layer_{index}",
            lambda: compute_gqa_group_importance(
                self.model, index, streams[0], self.config.importance_method,
                gradient_checkpointing=self.text.gradient_checkpointing,
            ),
        )  # fmt: skip
        pruned = {kind: select_gqa_groups_to_prune(scores[kind], count) for kind, count in counts.items()}
        if self.config.compensation == "lstsq":
            repair_layer(self.model, index, {kind: ~gone for kind, gone in pruned.items()}, streams[1])
        prune_attention_by_gqa_groups(self.model, index, pruned[GROUPS])
        prune_mlp_channels(self.model, index, pruned[CHANNELS])

    def _counts(self, parts: LayerParts, index: int, budget: float, share: float) -> dict[str, int]:
        """How many groups and channels of the layer go now."""
        groups = self.before[index][0]
        by_rate = int(self.config.attention_ratio * self.rates[index] * share * groups + 0.5)
        groups_gone, channels_gone = split_budget(
            budget, parts.groups, parts.structure_parameters(GROUPS), parts.channels,
            parts.structure_parameters(CHANNELS), by_rate - (groups - parts.groups), self.config.round_to,
        )  # fmt: skip
        return {GROUPS: groups_gone, CHANNELS: channels_gone}


# The search for a ratio.


def search_ratio(perplexity_at: Callable[[float], float], target: float, low: float, high: float, steps: int) -> float:
    """The largest ratio whose perplexity is under a target, by bisection.

    Args:
        perplexity_at: of the dense model pruned by that ratio, on text that nothing else uses.
        low, high: the range of ratios.

    Raises:
        UserError: no ratio that was tried stays under the target.
    """
    perplexities = {}

    def passes(ratio: float) -> bool:
        perplexities[ratio] = perplexity_at(ratio)
        log.info("Ratio %.4f: perplexity %.2f on held-out text, target %.2f", ratio, perplexities[ratio], target)
        return perplexities[ratio] < target

    best = largest_ratio(passes, low, high, steps)
    if best is None:
        ratio, value = min(perplexities.items())
        raise UserError(
            f"--target_perplexity {target:g}: the least ratio tried, {ratio:.4f}, gives {value:.2f} on held-out text; "
            "allow more, or try smaller ratios with more --search_steps"
        )
    return best
