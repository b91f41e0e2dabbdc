"""Masks -> physically smaller Linear layers."""

import copy
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from compression.checkpoint import write_description
from compression.decoder import Decoder, decoder_of
from compression.modeling import pruned_classes, pruned_decoder, pruned_encoder
from compression.offload import LayerWriter, offload_of, put_offloaded
from compression.runtime import UserError
from compression.structures import (
    DECODER_KINDS,
    ENCODER_KINDS,
    GROUPS,
    HEADS,
    LayerParts,
    family_of,
    head_dim,
    layers_of,
    spread,
)

# As `skip` names them.
_PARTS = dict(zip(ENCODER_KINDS, ("attention", "mlp"), strict=True))


def shrink(model: PreTrainedModel, kept: dict[str, list[Tensor]]) -> PreTrainedModel:
    """Build the physically smaller classifier.

    Args:
        model: a classifier of a supported encoder family, dense or already pruned; it is left as it is.
        kept: for heads and neurons one bool tensor [structures] per layer, True where the structure stays. An
            attention or FFN of which nothing stays is taken out; a layer of which both are gone is taken out whole.

    Returns:
        A model of the pruned class of that family, in evaluation mode, whose logits equal the masked model's, with the
        identity in the place of what was taken out.

    Raises:
        UserError: an architecture that is not supported, or no attention is left in any layer.
    """
    _check_attention(kept[HEADS])
    small = copy.deepcopy(model)
    for index in range(len(layers_of(small))):
        shrink_encoder_layer(small, index, {kind: kept[kind][index] for kind in ENCODER_KINDS})
    stay = _drop_empty_encoder_layers(small)
    config_class, model_class = pruned_classes(model.config.model_type, AutoModelForSequenceClassification)
    sizes = {index: _layer_values(parts) for index, parts in enumerate(layers_of(small))}
    values = _dense_values(model.config, stay) | {"head_size": head_dim(model.config), "per_layer_config": sizes}
    pruned = model_class(config_class(**values))
    pruned.load_state_dict(small.state_dict())
    return pruned.to(model.device).eval()  # type: ignore[arg-type]


def shrink_encoder_layer(model: PreTrainedModel, index: int, kept: dict[str, Tensor]) -> None:
    """Cut one layer of a classifier down in place: it computes on, in the stock class too.

    Args:
        kept: for some or all kinds a bool tensor [structures], True where the structure stays. Where none does, the
            attention or FFN is taken out.
    """
    before = layers_of(model)[index]
    for kind, stays in kept.items():
        if before.count(kind) and not stays.any():
            remove_part(model, kind, index)
    shrink_layer(layers_of(model)[index], kept)
    parts, family = layers_of(model)[index], family_of(model)
    if parts.heads:
        layer = attrgetter(family.layers)(model)[index]
        pruned_encoder.set_heads(layer, family, parts.heads, parts.head_size)


def remove_part(model: PreTrainedModel, kind: str, index: int) -> None:
    """Take a layer's attention (kind: heads) or FFN (neurons) out of a classifier in place, also while it is trained.

    The state passes by it unchanged from then on: its residual connection and its norm are gone too.
    """
    family = family_of(model)
    pruned_encoder.remove(attrgetter(family.layers)(model)[index], family, _PARTS[kind])


def _drop_empty_encoder_layers(model: PreTrainedModel) -> list[int]:
    """Take out the layers of which nothing is left; the indices of the others."""
    first = 0 if _keeps_first(model.config) else None
    stay = [index for index, parts in enumerate(layers_of(model)) if not parts.empty or index == first]
    parent, _, name = family_of(model).layers.rpartition(".")
    owner = attrgetter(parent)(model)
    setattr(owner, name, nn.ModuleList(getattr(owner, name)[index] for index in stay))
    return stay


def _keeps_first(config: PretrainedConfig) -> bool:
    """Whether no other layer can be the first: ModernBERT's has no norm, DeBERTa may have a convolution around it."""
    return config.model_type.endswith("modernbert") or getattr(config, "conv_kernel_size", 0) > 0


def _check_attention(kept: list[Tensor]) -> None:
    if not any(mask.any() for mask in kept):
        raise UserError("nothing is left of any layer's attention: choose a lower pruning ratio")


def shrink_decoder(
    model: PreTrainedModel, kept: dict[str, list[Tensor]], before: Callable[[int], None] = lambda _: None
) -> PreTrainedModel:
    """Make a language model physically smaller.

    Args:
        model: a LLaMA-class language model, dense or already pruned, in memory. It is used up: its weights are cut down
            in place and become the result's, so that no second copy of a large model is needed.
        kept: for groups and channels one bool tensor [structures] per layer, True where the structure stays. An
            attention or MLP of which nothing stays is taken out, but for the bias of its output projection; a layer of
            which not even a bias stays is taken out whole.
        before: called with each layer's index before that layer is cut down.

    Returns:
        A model of the pruned class of that family, in evaluation mode.

    Raises:
        UserError: an architecture that is not supported, or no attention is left in any layer.
    """
    decoder = decoder_of(model)
    for _ in _cut_layers(decoder, kept, before):
        pass
    return to_pruned(model, _drop_empty_layers(decoder))


def write_shrunk_decoder(
    model: PreTrainedModel,
    kept: dict[str, list[Tensor]],
    folder: Path | None,
    max_shard_size: int,
    before: Callable[[int], None] = lambda _: None,
) -> None:
    """As `shrink_decoder`, of an offloaded model: each layer is written as soon as it is cut down.

    Args:
        folder: an existing one, which gets all of a checkpoint but the tokenizer; None: another process writes.
        max_shard_size: bytes of weights per file.
    """
    decoder, writer = decoder_of(model), LayerWriter(model, folder, max_shard_size)
    for index in _cut_layers(decoder, kept, before):
        if not layers_of(model)[index].empty:
            writer.add(decoder.layers[index])
    writer.close()
    write_pruned_description(model, folder, _drop_empty_layers(decoder))


def write_pruned_description(
    model: PreTrainedModel, folder: Path | None, stay: list[int] | range | None = None
) -> None:
    """Write everything of a checkpoint but weights and tokenizer, for a language model that was cut down in place.

    Args:
        folder: None: another process writes.
        stay: which of the layers that the config describes are left; None: all of them.
    """
    config, model_class = _pruned_config(model, stay)
    if folder is not None:
        with torch.device("meta"):
            described = model_class(config)
        described.generation_config = model.generation_config
        write_description(described, folder)


def _cut_layers(decoder: Decoder, kept: dict[str, list[Tensor]], before: Callable[[int], None]) -> Iterator[int]:
    """Cut down layer after layer; yields the index of each while its weights are there."""
    _check_attention(kept[GROUPS])
    for index in range(len(decoder.layers)):
        with decoder.present(index):
            before(index)
            cut_layer(decoder, index, {kind: kept[kind][index] for kind in DECODER_KINDS})
            yield index


def cut_layer(decoder: Decoder, index: int, kept: dict[str, Tensor]) -> None:
    """Cut one layer down in place, or take its attention or MLP out, but for the bias of the output projection.

    Args:
        kept: for some or all kinds a bool tensor [structures], True where the structure stays.
    """
    # What is taken out may be mapped from a file: nothing must refer to it behind this.
    layer, parts, family = decoder.layers[index], layers_of(decoder.model)[index], decoder.family
    for kind, stays in kept.items():
        if parts.count(kind):
            if stays.any():
                shrink_decoder_layer(decoder, index, {kind: stays})
            else:
                pruned_decoder.remove(layer, family.part(kind), family.around)


def shrink_decoder_layer(decoder: Decoder, index: int, kept: dict[str, Tensor]) -> None:
    """Cut one layer down in place: it computes on, in the stock class too, with fewer heads of one ratio.

    Args:
        kept: for some or all kinds a bool tensor [structures], True where the structure stays; some of each kind must.
    """
    shrink_layer(layers_of(decoder.model)[index], kept)
    parts = layers_of(decoder.model)[index]
    if parts.groups:
        pruned_decoder.set_heads(decoder.layers[index].self_attn, decoder.model.config, parts.query_heads, parts.groups)


def _drop_empty_layers(decoder: Decoder) -> list[int]:
    """Take out the layers of which nothing is left; the indices of the others."""
    stay = [index for index, parts in enumerate(layers_of(decoder.model)) if not parts.empty]
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in stay)
    return stay


def to_pruned(model: PreTrainedModel, stay: list[int] | range | None = None) -> PreTrainedModel:
    """A language model whose layers were cut down in place, of the pruned class of its family.

    Args:
        model: used up, its weights become the result's.
        stay: which of the layers that the config describes are left; None: all of them.
    """
    return _rebuild(model, *_pruned_config(model, stay))


def _pruned_config(
    model: PreTrainedModel, stay: list[int] | range | None
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The config that describes a model's layers as they are, and its class."""
    stay = range(len(layers_of(model))) if stay is None else stay
    config_class, model_class = pruned_classes(model.config.model_type, AutoModelForCausalLM)
    layers = {index: _layer_values(parts) for index, parts in enumerate(layers_of(model))}
    return config_class(**_decoder_values(model, stay) | {"per_layer_config": layers}), model_class


def stock_group_counts(model: PreTrainedModel) -> list[int]:
    """The numbers of key-value heads per layer, largest first, that the stock class of a language model takes.

    Its number of query heads has to divide the hidden size; a class may ask for more.
    """
    parts, hidden = layers_of(model)[0], model.config.hidden_size
    queries = parts.query_heads // parts.groups
    counts = (count for count in range(parts.groups, 0, -1) if hidden % (count * queries) == 0)
    heads = ({"num_attention_heads": count * queries, "num_key_value_heads": count} for count in counts)
    return [sizes["num_key_value_heads"] for sizes in heads if _stock_refuses(model, sizes) is None]


def _stock_config(model: PreTrainedModel, sizes: dict[str, int]) -> PretrainedConfig:
    """The stock config of a language model, with these sizes in every layer.

    Raises:
        StrictDataclassClassValidationError: it refuses them.
    """
    model_type = model.config.model_type.removeprefix("pruned_")
    return AutoConfig.for_model(model_type, **_decoder_values(model, range(len(layers_of(model)))) | sizes)


def _stock_refuses(model: PreTrainedModel, sizes: dict[str, int]) -> BaseException | None:
    """Why the stock config refuses sizes, if it does."""
    try:
        _stock_config(model, sizes)
    except StrictDataclassClassValidationError as error:
        return error.__cause__
    return None


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A pruned language model of the stock class of its family, which needs every layer to have the same sizes.

    Args:
        model: used up, its weights become the result's.

    Raises:
        UserError: the layers differ, or the stock class refuses their number of heads.
    """
    layers = layers_of(model)
    sizes = {(parts.query_heads, parts.groups, parts.channels) for parts in layers}
    if len(sizes) > 1 or not all(*sizes):
        raise UserError(f"layers of different sizes {sorted(sizes)} cannot be had in the stock model class")
    values = _layer_values(layers[0])
    if (why := _stock_refuses(model, values)) is not None:
        model_type = model.config.model_type.removeprefix("pruned_")
        raise UserError(f"the stock {model_type} class refuses the pruned sizes: {why}")
    config = _stock_config(model, values)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return _rebuild(model, config, model_class)  # type: ignore[arg-type]


def _rebuild(model: PreTrainedModel, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of another class and config around the same weights."""
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        rebuilt = model_class(config)
    rebuilt.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    Decoder(rebuilt).share_tables(Decoder(model))
    if getattr(model, "generation_config", None) is not None:
        rebuilt.generation_config = model.generation_config
    if (offloaded := offload_of(model)) is not None:
        put_offloaded(rebuilt, offloaded.shards, offloaded.placement)
    return rebuilt.eval()


def _decoder_values(model: PreTrainedModel, stay: list[int] | range) -> dict[str, Any]:
    """The values of a dense decoder's config with these of its layers."""
    return _dense_values(model.config, stay) | {"head_dim": head_dim(model.config)}


def _dense_values(config: PretrainedConfig, stay: list[int] | range) -> dict[str, Any]:
    """The values of a dense config with these of its layers, each under the name that the family gives it."""
    values = config.to_dict()
    others = ("model_type", "architectures", "auto_map", "head_size", "per_layer_config", "transformers_version")
    for name in (*others, *config.attribute_map):
        values.pop(name, None)
    for name in ("layer_types", "no_rope_layers"):  # an entry for each layer
        if values.get(name):
            values[name] = [values[name][index] for index in stay]
    return values | {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(stay)}


def _layer_values(parts: LayerParts) -> dict[str, Any]:
    """What `per_layer_config` says of a layer."""
    attention, ffn = map(parts.count, parts.kinds)
    values: dict[str, Any] = {}
    if attention:
        values["num_attention_heads"] = parts.query_heads
    if attention and GROUPS in parts.kinds:
        values["num_key_value_heads"] = attention
    if ffn:
        values["intermediate_size"] = ffn
    skip = ["attention"] * (not attention) + ["mlp"] * (not ffn)
    return values | ({"skip": skip} if skip else {})


def shrink_layer(parts: LayerParts, kept: dict[str, Tensor]) -> None:
    """Cut the weights of one layer down in place.

    Args:
        kept: for some or all kinds a bool tensor [structures], True where the structure stays.
    """
    for kind, stays in kept.items():
        if not parts.count(kind):
            continue
        inner, outer = parts.split(kind)
        for rows in (*inner, *(parts.norms if parts.is_attention(kind) else ())):
            slice_rows(rows.module, rows.spread(stays))
        slice_columns(outer, spread(stays, outer.in_features))


@torch.no_grad()
def slice_rows(module: Any, rows: Tensor) -> None:
    """Cut a Linear module or a norm down in place to the rows (outputs) that a bool mask keeps."""
    module.weight = nn.Parameter(module.weight[rows].clone())
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias[rows].clone())
    if isinstance(module, nn.Linear):
        module.out_features = len(module.weight)


@torch.no_grad()
def slice_columns(linear: nn.Linear, columns: Tensor) -> None:
    """Cut a Linear module down in place to the columns (inputs) that a bool mask keeps."""
    linear.weight = nn.Parameter(linear.weight[:, columns].clone())
    linear.in_features = linear.weight.shape[1]
