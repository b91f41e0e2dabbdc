"""H-GSP: hybrid global structural pruning of LLaMA-class models, in depth and in width at once.

Every GQA group (a key-value head with its query heads) and every MLP channel gets a score; the scores of all layers
compete for one parameter budget, and layers of which too little would be left go altogether.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compression.allocation import Pool, all_but_least, keep_or_drop_layers
from compression.config import StageConfig
from compression.decoder import decoder_of
from compression.hooks import hooked
from compression.llm.perplexity import perplexity
from compression.llm.repair import repair
from compression.llm.scoring import SCORES, ScoreName, score_structures
from compression.llm.text import CalibrationText
from compression.runtime import UserError, log
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, layers_of, spread
from compression.surgery import shrink_decoder

Kept = dict[str, list[Tensor]]


@dataclass
class PruningFields(StageConfig):
    """What is pruned and how; each choice can be switched off alone."""

    pruning_ratio: float = 0.5
    """Share of the decoder layers' parameters to remove."""
    importance_method: ScoreName = "fisher"
    """How structures are scored."""
    temperature: float = 0.0
    """Exponent T of the correction by removal perplexities, score * ln(1 + ppl)^T; 0 leaves it out."""
    tau: float | None = None
    """Removal perplexity under which the layer's value corrects, above it the block's own; none: 25th percentile."""
    epsilon: float = 0.15
    """A layer that would keep less than this share of its parameters is removed whole."""
    normalize: Literal["auto", "none", "layer"] = "auto"
    """layer: scores are relative to their mean in each layer and kind, so that layers share the budget evenly; auto:
    that for the methods whose scores do not compare across layers as they are."""
    protect_first: int = 0
    """So many layers at the start are left alone."""
    protect_last: int = 0
    """So many layers at the end are left alone."""
    attention_factors: tuple[float, ...] = (1.0,)
    """Factors on the scores of attention groups; the one with the least perplexity on held-out text is taken."""
    iterative_steps: int = 1
    """The budget is reached in so many steps, with new scores at each."""
    compensation: Literal["none", "lstsq"] = "lstsq"
    """lstsq: solve the output projections anew so that what stays makes up for what goes."""
    uniform: bool = False
    """Every layer gets the same sizes, so that the stock model class loads the result; no layer is protected then."""
    round_to: int = 32
    """MLP widths are multiples of this, unless nothing is removed: matrix units are slow at odd widths."""

    presets = {
        "paper": dict(
            importance_method="taylor", normalize="none", temperature=1.0, compensation="none", round_to=1
        )
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        self.check_range("pruning_ratio", 0, 0.95)
        self.check_range("temperature", 0, 10)
        self.check_range("epsilon", 0, 1)
        if self.tau is not None:
            self.check_range("tau", 0)
        for name in ("protect_first", "protect_last"):
            self.check_range(name, 0)
        self.check_range("iterative_steps", 1)
        self.check_range("round_to", 1)
        if not self.attention_factors or min(self.attention_factors) <= 0:
            raise UserError(f"--attention_factors {self.attention_factors}: allowed are one or more above 0")

    @property
    def normalization(self) -> Literal["none", "layer"]:
        """`normalize`, where it is auto: what suits the method."""
        # Resolved here and not when the config is built: a preset is built before a flag names the method.
        if self.normalize != "auto":
            return self.normalize
        return "none" if SCORES[self.importance_method].comparable else "layer"

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"normalize": self.normalization}


class GlobalPruning:
    """One model on its way to the budget.

    Args:
        model: used up; `prune` returns the smaller one.
        removal: what `removal_perplexities` gave for the dense model; needed where temperature is above 0.
        cached: given a name and a function that makes named tensors, gives these or what an earlier run made.

    Raises:
        UserError: the ratio cannot be reached with the protected layers left alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: PruningFields,
        text: CalibrationText,
        removal: dict[str, Any] | None = None,
        cached: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = lambda _, make: make(),
    ):
        self.model, self.config, self.text, self.removal, self.cached = model, config, text, removal, cached
        decoder_of(model)
        layers = layers_of(model)
        # Of each layer and structure that is left: its place in the dense model.
        self.origin = list(range(len(layers)))
        self.places = {kind: [torch.arange(parts.count(kind)) for parts in layers] for kind in DECODER_KINDS}
        self.parameters = {kind: [parts.structure_parameters(kind) for parts in layers] for kind in DECODER_KINDS}
        self.total = sum(parts.parameters for parts in layers)
        self.depth = len(layers)
        self.table: dict[tuple[int, str, int], dict[str, Any]] = {}
        protected = sum(parts.parameters for index, parts in enumerate(layers) if self._is_protected(index))
        if config.pruning_ratio * self.total > self.total - protected:
            raise UserError(
                f"--pruning_ratio {config.pruning_ratio}: with {config.protect_first} and {config.protect_last} "
                f"protected layers at most {1 - protected / self.total:.3f} can go; set --protect_first and "
                "--protect_last lower"
            )

    def prune(self) -> PreTrainedModel:
        """Remove structures until the budget is met."""
        steps = self.config.iterative_steps
        for step in range(1, steps + 1):
            scores = self._cached_by_kind(f"scores_of_step_{step}_of_{steps}", self._score)
            densities = self._densities(scores)
            ratio = self.config.pruning_ratio * step / steps
            choose = partial(self._best_choice, densities, step, ratio)
            kept = self._cached_by_kind(f"kept_in_step_{step}_of_{steps}", choose)
            self._note(scores, densities)
            log.info("Step %d of %d: %s", step, steps, _summary(kept))
            if self.config.compensation == "lstsq":
                repair(self.model, kept, self.text.repair, self.text.batch_size)
            self._follow(kept, step)
            self.model = shrink_decoder(self.model, kept)
        return self.model

    def _is_protected(self, layer: int) -> bool:
        ends = layer < self.config.protect_first or layer >= self.depth - self.config.protect_last
        return ends and not self.config.uniform

    def _score(self) -> Kept:
        return score_structures(
            self.model, self.text.scores, self.config.importance_method, self.text.batch_size,
            self.text.gradient_checkpointing,
        )  # fmt: skip

    def _cached_by_kind(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, or gave in an earlier run; its tensors are kept by names such as groups.3."""

        def named() -> dict[str, Tensor]:
            made = make()
            return {f"{kind}.{index}": value for kind in DECODER_KINDS for index, value in enumerate(made[kind])}

        tensors = self.cached(name, named)
        return {kind: [tensors[f"{kind}.{index}"] for index in range(len(self.origin))] for kind in DECODER_KINDS}

    def _best_choice(self, densities: Kept, step: int, ratio: float) -> Kept:
        if self.config.uniform:
            choices = self._same_sizes(densities, ratio)
        else:
            factors = self.config.attention_factors
            choices = {f"attention factor {factor:g}": self._allocate(densities, ratio, factor) for factor in factors}
        if len(choices) == 1:
            return next(iter(choices.values()))
        perplexities = {}
        for name, kept in choices.items():
            with masked(self.model, kept):
                perplexities[name] = perplexity(self.model, self.text.held_out, self.text.batch_size)
            log.info("Step %d, %s: perplexity %.2f on held-out text", step, name, perplexities[name])
        return choices[min(perplexities, key=perplexities.__getitem__)]

    def _densities(self, scores: Kept) -> Kept:
        """Scores per parameter, corrected and on the scale on which layers compete."""
        densities: Kept = {kind: [] for kind in DECODER_KINDS}
        for kind in DECODER_KINDS:
            for layer, score in zip(self.origin, scores[kind], strict=True):
                density = score.cpu() / max(self.parameters[kind][layer], 1) * self._correction(layer, kind)
                if self.config.normalization == "layer" and len(density):
                    density = density / density.mean().clamp_min(torch.finfo(density.dtype).tiny)
                densities[kind].append(density)
        return densities

    def _correction(self, layer: int, kind: str) -> float:
        """ln(1 + ppl)^T, ppl the layer's removal perplexity where that is under tau, else the block's own."""
        if not self.config.temperature:
            return 1.0
        layers = torch.tensor(self.removal["layer"])
        tau = layers.quantile(0.25).item() if self.config.tau is None else self.config.tau
        block = self.removal["attention" if kind == GROUPS else "mlp"][layer]
        value = layers[layer].item() if layers[layer] < tau else block
        return torch.tensor(value).log1p().pow(self.config.temperature).item()

    def _allocate(self, densities: Kept, ratio: float, attention_factor: float) -> Kept:
        """What stays when a share `ratio` of the dense layers' parameters is gone in all."""
        layers = []
        for index, layer in enumerate(self.origin):
            pools = []
            for kind, factor, multiple in ((GROUPS, attention_factor, 1), (CHANNELS, 1.0, self.config.round_to)):
                density = densities[kind][index]
                least = len(density) if self._is_protected(layer) else 0
                pools.append(Pool(density * factor, self.parameters[kind][layer], least, multiple))
            layers.append(pools)
        left = sum(pool.parameters * len(pool.scores) for pools in layers for pool in pools)
        target = max(0.0, 1 - (1 - ratio) * self.total / left)
        kept = keep_or_drop_layers(layers, target, self.config.epsilon)
        return {kind: [stay[place] for stay in kept] for place, kind in enumerate(DECODER_KINDS)}

    def _same_sizes(self, densities: Kept, ratio: float) -> dict[str, Kept]:
        """What stays if every layer keeps as many groups and channels: one choice for each number of groups."""
        choices, budget = {}, (1 - ratio) * self.total / self.depth
        most = len(densities[GROUPS][0])
        queries_per_group = layers_of(self.model)[0].query_heads // most
        for groups in range(most, 0, -1):
            # The stock LLaMA class wants the number of query heads to divide the hidden size.
            if self.model.config.hidden_size % (groups * queries_per_group):
                continue
            left = budget - groups * self.parameters[GROUPS][0]
            channels = int(left / self.parameters[CHANNELS][0]) // self.config.round_to * self.config.round_to
            if self.config.round_to <= channels <= len(densities[CHANNELS][0]):
                counts = {GROUPS: groups, CHANNELS: channels}
                kept = {
                    kind: [_largest(density, counts[kind]) for density in densities[kind]] for kind in DECODER_KINDS
                }
                choices[f"{groups} groups and {channels} channels"] = kept
        if not choices:
            raise UserError(f"--pruning_ratio {ratio}: no uniform sizes meet it; choose a lower one, or no --uniform")
        return choices

    # The table of all structures.

    def _note(self, scores: Kept, densities: Kept) -> None:
        for kind in DECODER_KINDS:
            for index, layer in enumerate(self.origin):
                columns = self.places[kind][index], scores[kind][index], densities[kind][index]
                for place, score, density in zip(*(column.tolist() for column in columns), strict=True):
                    self.table[layer, kind, place] = {
                        "layer": layer, "kind": kind, "index": place, "parameters": self.parameters[kind][layer],
                        "score": score, "density": density, "removed_in_step": None,
                    }  # fmt: skip

    def _follow(self, kept: Kept, step: int) -> None:
        """Keep track of what is left, and of what went when."""
        biased = [parts.biased for parts in layers_of(self.model)]
        stay = []
        for index, layer in enumerate(self.origin):
            for kind in DECODER_KINDS:
                places, stays = self.places[kind][index], kept[kind][index]
                for place in places[~stays].tolist():
                    self.table[layer, kind, place]["removed_in_step"] = step
                self.places[kind][index] = places[stays]
            if biased[index] or any(len(self.places[kind][index]) for kind in DECODER_KINDS):
                stay.append(index)
        self.origin = [self.origin[index] for index in stay]
        self.places = {kind: [self.places[kind][index] for index in stay] for kind in DECODER_KINDS}


def _summary(kept: Kept) -> str:
    """How many structures stay."""
    counts = (
        f"{sum(int(m.sum()) for m in kept[kind])} of {sum(map(len, kept[kind]))} {kind}" for kind in DECODER_KINDS
    )
    return ", ".join(counts) + " stay"


def _largest(scores: Tensor, count: int) -> Tensor:
    """Which structures stay when so many of largest score do, of equal ones the first: bool [structures]."""
    return all_but_least(scores.flip(0), len(scores) - count).flip(0)


@contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """The outputs of what is not kept count as zero: the smaller model's logits before it is made."""
    with hooked(_mask_hooks(model, kept)):
        yield


def _mask_hooks(model: PreTrainedModel, kept: Kept) -> Iterator[RemovableHandle]:
    for index, parts in enumerate(layers_of(model)):
        for kind in DECODER_KINDS:
            if parts.count(kind) and not kept[kind][index].all():
                outer = parts.split(kind)[1]
                columns = spread(kept[kind][index], outer.in_features).to(outer.weight.device, outer.weight.dtype)
                yield outer.register_forward_pre_hook(lambda _, given, columns=columns: given[0] * columns)
