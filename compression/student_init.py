"""Start a DistilBERT student from the layers of a BERT, as DistilBERT itself was made."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer
from transformers.models.distilbert.modeling_distilbert import Embeddings, TransformerBlock


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
    if not layers or not all(0 <= index < len(whole) for index in layers):
        raise ValueError(f"layers {list(layers)}: the BERT has layers 0 to {len(whole) - 1}")
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
