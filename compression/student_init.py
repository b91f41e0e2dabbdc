"""Start a student from some layers of its teacher, as DistilBERT itself was made (Sanh et al. 2019, arXiv:1910.01108).

`with_layers` keeps the architecture and everything around the layers; `student_from_teacher` makes a DistilBERT of a
BERT without a head, for the embedded default.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer
from transformers.models.distilbert.modeling_distilbert import Embeddings, TransformerBlock

from compression.outputs import some
from compression.runtime import UserError
from compression.structures import family_of


def with_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of a dense model that has only some of its layers, in their order, and all its other weights.

    Args:
        model: of L layers; it is not changed and shares no memory with the copy.
        layers: which to take, e.g. (0, 2, 4); each in 0..L-1.

    Returns:
        A model of the same class in evaluation mode, on the device and in the dtype of `model`.

    Raises:
        UserError: the architecture is not supported, or its first layer is made otherwise than the one that would take
            its place.
        ValueError: `layers` is empty or names a layer that the model does not have.
    """
    whole = attrgetter(family_of(model).layers)(model)
    _check(layers, len(whole))
    path = next(name for name, module in model.named_modules() if module is whole)
    weights = dict(_renumbered(model.state_dict(), f"{path}.", layers))
    student = type(model)(_config_of(model.config, layers))
    if misfits := sorted(weights.keys() ^ student.state_dict().keys()):
        raise UserError(
            f"--student_layers {','.join(map(str, layers))}: the first layer of {model.config.model_type} is made "
            f"otherwise than the others ({some(misfits)}) and has to stay the first; begin with 0"
        )
    student.to(model.device, model.dtype)  # type: ignore[arg-type]  # transformers wraps it in a way that hides its self
    student.load_state_dict(weights)
    return student.eval()


def _renumbered(weights: dict[str, Tensor], path: str, layers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model of these layers alone, by their names there."""
    places = {str(index): place for place, index in enumerate(layers)}
    for name, value in weights.items():
        index, _, rest = name.removeprefix(path).partition(".")
        if not name.startswith(path):
            yield name, value
        elif index in places:
            yield f"{path}{places[index]}.{rest}", value


def _config_of(config: Any, layers: Sequence[int]) -> Any:
    config = deepcopy(config)
    if (types := getattr(config, "layer_types", None)) is not None:  # what each layer attends to
        config.layer_types = [types[index] for index in layers]
    config.num_hidden_layers = len(layers)
    return config


def _check(layers: Sequence[int], count: int) -> None:
    if not layers or not all(0 <= index < count for index in layers):
        raise ValueError(f"layers {list(layers)}: the model has layers 0 to {count - 1}")


def student_from_teacher(bert: BertModel, layers: Sequence[int]) -> DistilBertModel:
    """Build a DistilBERT whose layers are copies of some layers of a BERT.

    With all the layers, its hidden states equal those of the BERT for inputs of one segment. (DistilBERT
    fixes the epsilon of its LayerNorms to 1e-12, which is BERT's default.)

    Args:
        bert: an encoder of L layers; it is not changed and shares no memory with the student.
        layers: which of its layers to take, in the student's order, e.g. (0, 2, 4); each in 0..L-1.

    Returns:
        The student in evaluation mode, on the device and in the dtype of `bert`.

    Raises:
        ValueError: `layers` is empty or names a layer that the BERT does not have.
    """
    whole = [*bert.encoder.layer]
    _check(layers, len(whole))
    student = DistilBertModel(_student_config(bert.config, len(layers)))
    student.to(bert.device, bert.dtype)  # type: ignore[arg-type]  # transformers wraps it in a way that hides its self
    _copy_embeddings(bert.embeddings, student.embeddings)
    for index, block in zip(layers, [*student.transformer.layer], strict=True):
        for source, target in _matching_modules(whole[index], block):
            target.load_state_dict(source.state_dict())
    return student.eval()


def _student_config(config: BertConfig, n_layers: int) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        n_layers=n_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        activation=config.hidden_act,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
    )


@torch.no_grad()
def _copy_embeddings(source: BertEmbeddings, target: Embeddings) -> None:
    target.word_embeddings.weight.copy_(source.word_embeddings.weight)
    # DistilBERT has no token types. BERT adds row 0 of them to every position of a one-segment input, so that
    # row moves into the position embeddings.
    target.position_embeddings.weight.copy_(source.position_embeddings.weight + source.token_type_embeddings.weight[0])
    target.LayerNorm.load_state_dict(source.LayerNorm.state_dict())


def _matching_modules(layer: BertLayer, block: TransformerBlock) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs (module of a BERT layer, module of a DistilBERT block) that compute the same."""
    yield layer.attention.self.query, block.attention.q_lin
    yield layer.attention.self.key, block.attention.k_lin
    yield layer.attention.self.value, block.attention.v_lin
    yield layer.attention.output.dense, block.attention.out_lin
    yield layer.attention.output.LayerNorm, block.sa_layer_norm
    yield layer.intermediate.dense, block.ffn.lin1
    yield layer.output.dense, block.ffn.lin2
    yield layer.output.LayerNorm, block.output_layer_norm
