"""H-GSP: hybrid global structural pruning of LLaMA-class models, in depth and in width at once.

Every GQA group (a key-value head with its query heads) and every MLP channel gets a score; the scores of all layers
compete for one budget, of parameters or of measured time, and layers of which too little would be left go altogether.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compression.allocation import Cost, Pool, all_but_least, keep_or_drop_layers
from compression.decoder import decoder_of
from compression.hooks import hooked
from compression.llm.levels import Search
from compression.llm.perplexity import perplexity
from compression.llm.repair import LocalChoice, LocalRanking, Repair, repairing
from compression.llm.repair_text import RepairText
from compression.llm.score_passes import labels_behind, score_structures
from compression.llm.scoring import SCORES, LossName, ScoreName, loss_of
from compression.llm.search import AllocationSearch, Kept, Space
from compression.llm.speed import Target
from compression.llm.stitching import Solutions, placing
from compression.llm.text import CalibrationText
from compression.offload import Store, no_store, offload_of
from compression.runtime import UserError, log, log_phase
from compression.saved_parts import Cached
from compression.structures import CHANNELS, DECODER_KINDS, GROUPS, LayerParts, layers_of, spread
from compression.surgery import shrink_decoder, stock_group_counts, write_shrunk_decoder

PRUNING_RATIO = 0.5
"""Share of the layers' parameters that goes where nothing says how much."""


@dataclass(frozen=True)
class Scoring:
    """How structures are scored, and on which scale the layers compete."""

    importance_method: ScoreName
    score_loss: LossName
    temperature: float
    tau: float | None
    normalize: Literal["auto", "none", "layer"]

    @property
    def normalization(self) -> Literal["none", "layer"]:
        """`normalize`; where it is auto, what suits the method."""
        if self.normalize != "auto":
            return self.normalize
        return "none" if SCORES[self.importance_method].comparable else "layer"

    @property
    def loss(self) -> Literal["text", "kl"]:
        """`score_loss`; where it is auto, what suits the method."""
        return loss_of(self.score_loss, self.importance_method)


@dataclass(frozen=True)
class Budget:
    """How much goes, where from, in which steps, and whether what stays is repaired.

    Attributes:
        pruning_ratio: share of the layers' parameters to remove; None: `PRUNING_RATIO`.
        target: instead of it, the share of the layers' time in a phase that may stay.
    """

    pruning_ratio: float | None
    target: Target | None
    epsilon: float
    protect_first: int
    protect_last: int
    keep_attention: bool
    attention_factors: tuple[float, ...]
    iterative_steps: int
    repair: Repair
    removal_steps: int
    local_choice: LocalRanking
    uniform: bool
    round_to: int

    @property
    def share(self) -> float:
        """The share of what the layers cost that goes."""
        if self.target is not None:
            return 1 - self.target[1]
        return PRUNING_RATIO if self.pruning_ratio is None else self.pruning_ratio

    @property
    def flag(self) -> str:
        """What says how much goes, for error texts."""
        return f"--pruning_ratio {self.share:g}" if self.target is None else "--target {} {:g}".format(*self.target)

    @property
    def milder(self) -> str:
        """How another value of it would be that removes less."""
        return "lower" if self.target is None else "higher"


class GlobalPruning:
    """One model on its way to the budget.

    Args:
        model: used up; `prune` returns the smaller one.
        removal: what `removal_perplexities` gave for the dense model; needed where temperature is above 0.
        cached: given a name and a function that makes named tensors, gives these or what an earlier run made.
        store: where an offloaded model's smaller forms go.
        search: whether and how the allocation is searched for.
        train: given the smaller model and the step, from 1, trains it and gives it back; None: it stays as it is.
        costs: by kind and layer what structures cost, in the unit of the budget; None: their parameters.

    Attributes:
        table: of each structure of the dense model what it is, its score, and when it went.
        searches: of each step what its search found, layers by their place in the dense model.

    Raises:
        UserError: a search of an offloaded model; or the ratio cannot be reached with the protected layers left alone,
            or with attention in every layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scoring: Scoring,
        budget: Budget,
        text: CalibrationText,
        removal: dict[str, Any] | None = None,
        cached: Cached = lambda _, make: make(),
        store: Store = no_store,
        search: Search | None = None,
        train: Callable[[PreTrainedModel, int], PreTrainedModel] | None = None,
        costs: dict[str, list[Cost]] | None = None,
    ):
        self.train = train
        self.model, self.scoring, self.budget = model, scoring, budget
        self.text, self.removal, self.cached, self.store = text, removal, cached, store
        decoder_of(model)
        layers = layers_of(model)
        # Of each layer and structure that is left: its place in the dense model.
        self.origin = list(range(len(layers)))
        self.places = {kind: [torch.arange(parts.count(kind)) for parts in layers] for kind in DECODER_KINDS}
        self.parameters = {kind: [parts.structure_parameters(kind) for parts in layers] for kind in DECODER_KINDS}
        parameters = {kind: [Cost(each) for each in self.parameters[kind]] for kind in DECODER_KINDS}
        self.costs = parameters if costs is None else costs
        whole = [
            sum(self.costs[kind][index].of(parts.count(kind)) for kind in DECODER_KINDS)
            for index, parts in enumerate(layers)
        ]
        self.total = sum(whole)
        self.depth = len(layers)
        self.table: dict[tuple[int, str, int], dict[str, Any]] = {}
        self.search, self.searches = search or Search(), list[dict[str, Any]]()
        if self.search.search != "none" and offload_of(model) is not None:
            raise UserError(f"--search {self.search.search}: needs the model in memory: --offload none")
        protected = sum(each for index, each in enumerate(whole) if self._is_protected(index))
        if budget.share * self.total > self.total - protected:
            raise UserError(
                f"{budget.flag}: with {budget.protect_first} and {budget.protect_last} protected layers at most "
                f"{1 - protected / self.total:.3f} can go; set --protect_first and --protect_last lower"
            )
        if budget.keep_attention:
            self._check_attention_can_stay(layers)

    def _check_attention_can_stay(self, layers: list[LayerParts]) -> None:
        for index, parts in enumerate(layers):
            if not parts.groups:
                raise UserError(
                    f"--keep_attention: layer {index} of the model has no attention; give a --base_model that has one "
                    "in every layer"
                )
        if not self.budget.uniform:
            # Where the floors decide, scores do not.
            no_scores = {kind: [torch.zeros(len(places)) for places in self.places[kind]] for kind in DECODER_KINDS}
            self._allocate(no_scores, self.budget.share, 1.0)

    def prune(self) -> PreTrainedModel:
        """Remove structures until the budget is met."""
        steps = self.budget.iterative_steps
        labels = labels_behind(self.scoring.loss, self.model, self.text, self.cached)
        for step in range(1, steps + 1):
            scores = self._cached_by_kind(f"scores_of_step_{step}_of_{steps}", partial(self._score, labels))
            densities = self._densities(scores)
            log_phase("budget")
            ratio = self.budget.share * step / steps
            choose = partial(self._best_choice, densities, step, ratio)
            kept = self._cached_by_kind(f"kept_in_step_{step}_of_{steps}", choose)
            self._note(scores, densities)
            choice, solutions = self._local_choice(scores), None
            if self.search.search != "none":
                kept, solutions = self._searched(kept, densities, choice, step)
            log.info("Step %d of %d: %s", step, steps, _summary(kept))
            biased = [parts.biased for parts in layers_of(self.model)]
            self.model, kept = self._shrink(kept, step, choice, solutions)
            self._follow(kept, step, biased)
            if self.train is not None:
                self.model = self.train(self.model, step)
        return self.model

    def _local_choice(self, scores: Kept) -> LocalChoice | None:
        """What chooses within a layer; None: the scores have chosen."""
        if not self.budget.removal_steps:
            return None
        return LocalChoice(self.budget.removal_steps, scores if self.budget.local_choice == "product" else None)

    def _searched(
        self, kept: Kept, densities: Kept, choice: LocalChoice | None, step: int
    ) -> tuple[Kept, list[Solutions] | None]:
        """What stays in the sizes that a search finds, from those of `kept` on, and what is solved for them."""
        if all(stays.all() for kind in DECODER_KINDS for stays in kept[kind]):
            return kept, None
        layers = range(len(self.origin))
        fixed = {index for index in layers if self._is_protected(self.origin[index])}
        if self.budget.keep_attention:
            fixed |= {index for index in layers if not kept[GROUPS][index].any()}  # these go whole
        costs = {kind: [self.costs[kind][layer] for layer in self.origin] for kind in DECODER_KINDS}
        space = Space(densities, costs, frozenset(fixed), self.budget.keep_attention, self.budget.round_to)
        search = AllocationSearch(
            self.model,
            space,
            self.search,
            self.text,
            self._repair_text,
            self.budget.repair.share,
            choice,
            lambda name, make: self.cached(f"search_of_step_{step}_{name}", make),
        )
        found, solutions = search.search(kept)
        self.searches.append({"step": step, "layers": self.origin, **asdict(found)})
        return space.kept(found.after), solutions

    def _repair_text(self, error_share: float) -> RepairText:
        """What repairs are fitted to, before the first layer."""
        return RepairText(self.model, self.text.repair, self.text.batch_size, error_share, self.budget.repair.ridge)

    def _shrink(
        self, kept: Kept, step: int, choice: LocalChoice | None, solutions: list[Solutions] | None
    ) -> tuple[PreTrainedModel, Kept]:
        """The smaller model, repaired where that is asked for; of an offloaded one layer by layer, to the disk. And
        what stays in it.

        Args:
            solutions: the repair, where it is there.
        """
        model = self.model

        def repairs() -> Callable[[int], None]:
            repair = self.budget.repair
            if repair.compensation == "none":
                return lambda _: None
            if solutions is not None and not repair.mlp_rounds:  # solved for the output projections alone
                return placing(model, kept, solutions)
            return repairing(model, kept, self._repair_text(repair.share), choice, repair.mlp_rounds)

        def chosen() -> Kept:
            return kept if choice is None else self._cached_by_kind(f"chosen_in_step_{step}", lambda: kept)

        def write(folder: Path | None, max_shard_size: int) -> None:
            write_shrunk_decoder(model, kept, folder, max_shard_size, repairs())
            chosen()  # kept before the model is: a run that finds the model there does not choose again

        log_phase("repair and surgery")
        if offload_of(model) is None:
            return shrink_decoder(model, kept, repairs()), kept
        return self.store(f"model_of_step_{step}", model, write), chosen()

    def _least(self, layer: int, kind: str, count: int) -> int:
        """How many of a layer's structures stay at least, if the layer does."""
        if self._is_protected(layer):
            return count
        return int(kind == GROUPS and self.budget.keep_attention)

    def _is_protected(self, layer: int) -> bool:
        ends = layer < self.budget.protect_first or layer >= self.depth - self.budget.protect_last
        return ends and not self.budget.uniform

    def _score(self, labels: Tensor | None) -> Kept:
        log_phase("scores")
        return score_structures(
            self.model,
            self.text.scores,
            self.scoring.importance_method,
            self.text.batch_size,
            self.text.gradient_checkpointing,
            labels,
        )

    def _cached_by_kind(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, or gave in an earlier run; its tensors are kept by names such as groups.3."""

        def named() -> dict[str, Tensor]:
            made = make()
            return {f"{kind}.{index}": value for kind in DECODER_KINDS for index, value in enumerate(made[kind])}

        tensors = self.cached(name, named)
        return {kind: [tensors[f"{kind}.{index}"] for index in range(len(self.origin))] for kind in DECODER_KINDS}

    def _best_choice(self, densities: Kept, step: int, ratio: float) -> Kept:
        if self.budget.uniform:
            choices = self._same_sizes(densities, ratio)
        else:
            factors = self.budget.attention_factors
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
        """Scores per unit of cost, corrected and on the scale on which layers compete."""
        densities: Kept = {kind: [] for kind in DECODER_KINDS}
        for kind in DECODER_KINDS:
            for layer, score in zip(self.origin, scores[kind], strict=True):
                density = score.cpu() / max(self.costs[kind][layer].one, 1) * self._correction(layer, kind)
                if self.scoring.normalization == "layer" and len(density):
                    density = density / density.mean().clamp_min(torch.finfo(density.dtype).tiny)
                densities[kind].append(density)
        return densities

    def _correction(self, layer: int, kind: str) -> float:
        """ln(1 + ppl)^T, ppl the layer's removal perplexity where that is under tau, else the block's own."""
        if not self.scoring.temperature:
            return 1.0
        assert self.removal is not None, "the correction needs removal perplexities"
        layers = torch.tensor(self.removal["layer"])
        tau = layers.quantile(0.25).item() if self.scoring.tau is None else self.scoring.tau
        block = self.removal["attention" if kind == GROUPS else "mlp"][layer]
        value = layers[layer].item() if layers[layer] < tau else block
        return torch.tensor(value).log1p().pow(self.scoring.temperature).item()

    def _allocate(self, densities: Kept, ratio: float, attention_factor: float) -> Kept:
        """What stays when a share `ratio` of what the dense layers cost is gone in all."""
        layers = []
        for index, layer in enumerate(self.origin):
            pools = []
            for kind, factor, multiple in ((GROUPS, attention_factor, 1), (CHANNELS, 1.0, self.budget.round_to)):
                density = densities[kind][index]
                least = self._least(layer, kind, len(density))
                pools.append(Pool(density * factor, self.costs[kind][layer], least, multiple))
            layers.append(pools)
        # Of a layer that goes its biases stay, and with them a layer without attention.
        biased = {index for index, parts in enumerate(layers_of(self.model)) if parts.biased}
        lasting = biased if self.budget.keep_attention else frozenset[int]()
        left = sum(pool.whole for pools in layers for pool in pools)
        target = max(0.0, 1 - (1 - ratio) * self.total / left)
        try:
            kept = keep_or_drop_layers(layers, target, self.budget.epsilon, lasting)
        except ValueError:
            raise UserError(
                f"{self.budget.flag}: out of reach with --keep_attention; choose a {self.budget.milder} one, or remove "
                "more layers whole: set --epsilon higher, --protect_first and --protect_last lower"
            ) from None
        return {kind: [stay[place] for stay in kept] for place, kind in enumerate(DECODER_KINDS)}

    def _same_sizes(self, densities: Kept, ratio: float) -> dict[str, Kept]:
        """What stays if every layer keeps as many groups and channels: one choice for each number of groups."""
        choices, budget = {}, (1 - ratio) * self.total / self.depth
        for groups in stock_group_counts(self.model):
            left = budget - groups * self.parameters[GROUPS][0]
            channels = int(left / self.parameters[CHANNELS][0]) // self.budget.round_to * self.budget.round_to
            if self.budget.round_to <= channels <= len(densities[CHANNELS][0]):
                counts = {GROUPS: groups, CHANNELS: channels}
                kept = {
                    kind: [all_but_least(density, len(density) - counts[kind]) for density in densities[kind]]
                    for kind in DECODER_KINDS
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
                        "layer": layer,
                        "kind": kind,
                        "index": place,
                        "parameters": self.parameters[kind][layer],
                        "score": score,
                        "density": density,
                        "removed_in_step": None,
                    }

    def _follow(self, kept: Kept, step: int, biased: list[bool]) -> None:
        """Keep track of what is left, and of what went when.

        Args:
            biased: of each layer, whether something stays of it in any case.
        """
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


@contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """The outputs of what is not kept count as zero: the smaller model's logits before it is made."""
    with hooked(_mask_hooks(model, kept)):
        yield


def _mask_hooks(model: PreTrainedModel, kept: Kept) -> Iterator[RemovableHandle]:
    for index, parts in enumerate(layers_of(model)):
        for kind in DECODER_KINDS:
            stays = kept[kind][index]
            if parts.count(kind) and not stays.all():
                outer = parts.split(kind)[1]
                columns = spread(stays, outer.in_features)
                yield outer.register_forward_pre_hook(lambda _, given, columns=columns: given[0] * columns.to(given[0]))
                if parts.is_attention(kind) and stays.any():
                    for rows in parts.norms:
                        yield from _norm_hooks(rows.module, rows.spread(stays))


def _norm_hooks(norm: nn.Module, stays: Tensor) -> Iterator[RemovableHandle]:
    """Let an RMS norm divide by the mean square of these of its values alone, bool [width]; the others become zero."""
    factor = (len(stays) / int(stays.sum())) ** 0.5
    yield norm.register_forward_pre_hook(lambda _, given: given[0] * (factor * stays.to(given[0])))
    yield norm.register_forward_hook(lambda _, __, output: output / factor)
