"""GQA-aware pruning of LLaMA-class models, layer by layer: query heads go only together with their key-value head.

Each layer loses a share of its parameters, its rate; layers whose removal costs much lose less. From the first layer to
the last, the gradients are those of the model as it is pruned so far (first-order Taylor importance, as in LLM-Pruner,
Ma et al. 2023, arXiv:2305.11627), and a layer is cut down before the next one is looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.allocation import all_but_least, largest_ratio, split_budget, spread_rates
from compression.decoder import Decoder, decoder_of
from compression.llm.layerwise import LayerStream
from compression.llm.repair import Repair, repair_layer
from compression.llm.repair_text import RepairText
from compression.llm.score_passes import labels_behind, score_layer
from compression.llm.scoring import LossName, ScoreName, loss_of
from compression.llm.text import CalibrationText
from compression.offload import LayerWriter, Store, no_store, offload_of
from compression.progress import progress
from compression.runtime import UserError, log, log_phase
from compression.saved_parts import Cached
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, LayerParts, layers_of
from compression.surgery import shrink_decoder_layer, stock_group_counts, to_pruned, write_pruned_description

SWEEP = "model_of_sweep_"
"""The beginning of the names of an offloaded model's smaller forms, one for each sweep."""


# The three steps for one layer, each usable alone.


def compute_gqa_group_importance(
    model: PreTrainedModel,
    layer: int,
    text: Tensor | LayerStream,
    method: ScoreName = "taylor",
    batch_size: int = 1,
    gradient_checkpointing: bool = False,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Importance of one layer's groups (key-value heads with their query heads) and of its MLP channels.

    With `taylor`, a group's is the sum of |w * dL/dw| over its rows of k and v, the rows of q of all its query
    heads, and their columns of o; an MLP channel's that over its rows of gate and up and its column of down. L is the
    mean loss of a batch; the scores are means over batches. No other layer's weights get a gradient.

    Args:
        layer: its index.
        text: token ids [count, length]; or `LayerStream`, standing before this layer, which has batches already.
        method: one of `scoring.SCORES`.
        labels: [count, length - 1], the tokens whose loss it is, see `draw_labels`; None: the text's own.

    Returns:
        groups: [groups], channels: [channels], both fp32.

    Raises:
        UserError: an architecture that is not supported.
    """
    decoder_of(model)
    if isinstance(text, Tensor):
        text = LayerStream(model, text, batch_size, layer)
    return score_layer(model, layer, text, method, gradient_checkpointing, labels)


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
        shrink_decoder_layer(Decoder(model), layer, {kind: kept})


# Rates of the layers.


@dataclass(frozen=True)
class Rates:
    """Which layers lose how much, relative to one another."""

    layers: str
    strategy: Literal["inverse", "uniform", "random"]
    min_rate: float
    max_rate: float
    protect_first: int
    protect_last: int


@dataclass(frozen=True)
class Cuts:
    """What a layer loses for its rate, in which steps, and whether what stays is repaired."""

    importance_method: ScoreName
    score_loss: LossName
    attention_ratio: float
    round_to: int
    iterative_steps: int
    repair: Repair
    uniform: bool


def selected_layers(layers: str, depth: int | None) -> range:
    """The layers that --layers names, of a model of this depth.

    Raises:
        UserError: it is not a layer or a range of layers, or goes beyond the model's.
    """
    if layers == "all":
        return range(depth or 0)
    first, _, last = layers.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)) or layers.endswith("-"):
        raise UserError(f"--layers {layers}: allowed is all, one layer such as 12, or a range such as 10-14")
    if depth is not None and int(last) >= depth:
        raise UserError(f"--layers {layers}: the model has {depth} layers; allowed are 0 to {depth - 1}")
    return range(int(first), int(last) + 1)


def layer_rates(
    settings: Rates, layers: list[LayerParts], ratio: float, removal: dict[str, Any] | None, seed: int
) -> list[float]:
    """The share of its parameters that each layer loses, 0 where it is left alone.

    Args:
        ratio: share of the parameters of the layers that --layers names.
        removal: see `removal.removal_perplexities`; needed for inverse rates.
        seed: of random rates.

    Raises:
        UserError: no rates within the bounds meet the ratio; says which do.
    """
    check_ratio(settings, layers, ratio)
    pruned, weights, low, high = _bounds(settings, layers)
    target = ratio * _selected_parameters(settings, layers) / weights.sum().item()
    rates = spread_rates(_preference(settings, removal, pruned, seed), weights, target, low, high)
    found = dict(zip(pruned, rates.tolist(), strict=True))
    return [found.get(index, 0.0) for index in range(len(layers))]


def check_ratio(settings: Rates, layers: list[LayerParts], ratio: float) -> None:
    """Raise UserError unless rates within their bounds can meet the ratio."""
    least, most = ratio_range(settings, layers)
    if not least - 1e-9 <= ratio <= most + 1e-9:
        left_alone = len(layers) - len(prunable_layers(settings, layers))
        raise UserError(
            f"--pruning_ratio {ratio:g}: with --min_rate {settings.min_rate:g}, --max_rate {settings.max_rate:g} and "
            f"{left_alone} of {len(layers)} layers left alone allowed is {least:.3f} to {most:.3f}; change one of "
            "these, --layers, --protect_first or --protect_last"
        )


def ratio_range(settings: Rates, layers: list[LayerParts]) -> tuple[float, float]:
    """The least and the largest ratio that rates within their bounds can meet."""
    _, weights, low, high = _bounds(settings, layers)
    total = _selected_parameters(settings, layers)
    return (low * weights).sum().item() / total, (high * weights).sum().item() / total


def _bounds(settings: Rates, layers: list[LayerParts]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """The layers that lose something, their parameters, the least and the largest rate of each."""
    pruned = prunable_layers(settings, layers)
    weights = torch.tensor([layers[index].parameters for index in pruned], dtype=torch.double)
    high = torch.tensor([min(settings.max_rate, _reachable(layers[index])) for index in pruned], dtype=torch.double)
    return pruned, weights, high.clamp_max(settings.min_rate), high


def _selected_parameters(settings: Rates, layers: list[LayerParts]) -> int:
    return sum(layers[index].parameters for index in selected_layers(settings.layers, len(layers)))


def prunable_layers(settings: Rates, layers: list[LayerParts]) -> list[int]:
    """The layers that are to lose something.

    Raises:
        UserError: there are none.
    """
    depth = len(layers)
    ends = range(settings.protect_first, depth - settings.protect_last)
    pruned = [index for index in selected_layers(settings.layers, depth) if index in ends and layers[index].parameters]
    if not pruned:
        raise UserError(
            f"--layers {settings.layers}: all of them are protected by --protect_first {settings.protect_first} and "
            f"--protect_last {settings.protect_last} (the model has {depth} layers); set these lower"
        )
    return pruned


def _reachable(parts: LayerParts) -> float:
    """The share of a layer that can go when one structure of each kind stays."""
    least = sum(parts.structure_parameters(kind) for kind in DECODER_KINDS)
    return 1 - least / parts.parameters


def _preference(settings: Rates, removal: dict[str, Any] | None, pruned: list[int], seed: int) -> Tensor:
    """What the rates of these layers are proportional to, within their bounds."""
    if settings.strategy == "uniform":
        return torch.ones(len(pruned))
    if settings.strategy == "random":
        return torch.rand(len(pruned), generator=torch.Generator().manual_seed(seed)).clamp_min(1e-3)
    assert removal is not None, "inverse rates need removal perplexities"
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
        store: where an offloaded model's smaller forms go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rates: list[float],
        cuts: Cuts,
        text: CalibrationText,
        cached: Cached = lambda _, make: make(),
        store: Store = no_store,
    ):
        self.model, self.rates, self.cuts, self.text = model, rates, cuts, text
        self.cached, self.store = cached, store
        self.labels: Tensor | None = None
        decoder_of(model)
        self.stock_groups = stock_group_counts(model) if cuts.uniform else []
        self.before = [(parts.groups, parts.channels, parts.parameters) for parts in layers_of(model)]

    def prune(self) -> PreTrainedModel:
        """Remove what the rates say, in as many sweeps as the configuration wants."""
        offloaded = offload_of(self.model) is not None
        loss = loss_of(self.cuts.score_loss, self.cuts.importance_method)
        self.labels = labels_behind(loss, self.model, self.text, self.cached)
        for step in range(1, self.cuts.iterative_steps + 1):
            log_phase(f"sweep {step}")
            if offloaded:
                self.model = self.store(f"{SWEEP}{step}", self.model, partial(self._write_sweep, step))
            else:
                self._sweep(step)
        if not offloaded:
            self.model = to_pruned(self.model)
        return self.model

    def table(self) -> list[dict[str, Any]]:
        """What each layer was and is, a row per layer."""
        rows = []
        for index, (parts, (groups, channels, parameters)) in enumerate(
            zip(layers_of(self.model), self.before, strict=True)
        ):
            rows.append(
                {
                    "layer": index,
                    "rate": self.rates[index],
                    "removed": 1 - parts.parameters / max(parameters, 1),
                    "groups_before": groups,
                    "groups_after": parts.groups,
                    "channels_before": channels,
                    "channels_after": parts.channels,
                    "parameters_before": parameters,
                    "parameters_after": parts.parameters,
                }
            )
        return rows

    def removed(self, layers: str) -> float:
        """The share of the parameters of the layers that --layers names that is gone."""
        table = self.table()
        rows = [table[index] for index in selected_layers(layers, len(table))]
        before, after = (sum(row[f"parameters_{when}"] for row in rows) for when in ("before", "after"))
        return 1 - after / before

    def _write_sweep(self, step: int, folder: Path | None, max_shard_size: int) -> None:
        """As `_sweep`, of an offloaded model: each layer is written once it is done with."""
        writer = LayerWriter(self.model, folder, max_shard_size)
        self._sweep(step, writer.add)
        decoder = decoder_of(self.model)
        for index in range(writer.count, len(decoder.layers)):  # those that stay as they are
            with decoder.present(index) as layer:
                writer.add(layer)
        writer.close()
        write_pruned_description(self.model, folder)

    def _sweep(self, step: int, done: Callable[[nn.Module], None] = lambda _: None) -> None:
        """From the first layer to the last, so that the text goes through each layer once, when it is done with.

        Layers are cut to whole structures; what one removes too much, the next one removes less.

        Args:
            done: called with each layer while its weights are there.
        """
        share = step / self.cuts.iterative_steps
        scored = LayerStream(self.model, self.text.scores, self.text.batch_size)
        repair, settings = None, self.cuts.repair
        if settings.compensation == "lstsq":
            repair = RepairText(self.model, self.text.repair, self.text.batch_size, settings.share, settings.ridge)
        due = 0.0
        last = max((index for index, rate in enumerate(self.rates) if rate), default=-1)
        repairs_all = repair is not None and settings.share > 0
        for index in progress(range(len(self.rates) if repairs_all else last + 1), "layers"):
            with scored.decoder.present(index) as layer:
                if self.rates[index]:
                    left = layers_of(self.model)[index].parameters
                    due += self.rates[index] * share * self.before[index][2] - (self.before[index][2] - left)
                    self._prune_layer(index, due, step, scored, repair)
                    due -= left - layers_of(self.model)[index].parameters
                    if self.cuts.uniform:  # the next layer is to get the same sizes
                        due = 0.0
                if repair is not None and repair.layer == index:  # nothing of the layer went
                    parts = layers_of(self.model)[index]
                    everything = {kind: torch.ones(parts.count(kind)).bool() for kind in DECODER_KINDS}
                    repair_layer(repair, everything, mlp_rounds=settings.mlp_rounds)
                if index < last:
                    scored.advance()
                done(layer)

    def _prune_layer(
        self, index: int, budget: float, step: int, scored: LayerStream, repair: RepairText | None
    ) -> None:
        counts = self._counts(layers_of(self.model)[index], index, budget, step / self.cuts.iterative_steps)
        if not any(counts.values()):
            return
        scores = self.cached(
            f"scores_of_step{step}_layer_{index}",
            lambda: compute_gqa_group_importance(
                self.model,
                index,
                scored,
                self.cuts.importance_method,
                gradient_checkpointing=self.text.gradient_checkpointing,
                labels=self.labels,
            ),
        )
        pruned = {kind: select_gqa_groups_to_prune(scores[kind], count) for kind, count in counts.items()}
        if repair is not None:
            kept = {kind: ~gone for kind, gone in pruned.items()}
            repair_layer(repair, kept, mlp_rounds=self.cuts.repair.mlp_rounds)
        prune_attention_by_gqa_groups(self.model, index, pruned[GROUPS])
        prune_mlp_channels(self.model, index, pruned[CHANNELS])

    def _counts(self, parts: LayerParts, index: int, budget: float, share: float) -> dict[str, int]:
        """How many groups and channels of the layer go now."""
        groups = self.before[index][0]
        by_rate = int(self.cuts.attention_ratio * self.rates[index] * share * groups + 0.5)
        if self.cuts.uniform:
            by_rate = groups - min(self.stock_groups, key=lambda count: abs(count - groups + by_rate))
        groups_gone, channels_gone = split_budget(
            budget,
            parts.groups,
            parts.structure_parameters(GROUPS),
            parts.channels,
            parts.structure_parameters(CHANNELS),
            by_rate - (groups - parts.groups),
            self.cuts.round_to,
        )
        if self.cuts.uniform and parts.groups - groups_gone not in self.stock_groups:
            raise UserError(
                f"--uniform: the ratio leaves {parts.groups - groups_gone} key-value heads per layer, the stock class "
                f"takes {', '.join(map(str, self.stock_groups))}; choose another --pruning_ratio or --attention_ratio"
            )
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
