"""Training with quantized weights: fake quantization.

Training keeps fp32 weights and computes with the values that they will have once they are stored; the gradient passes
straight through to the fp32 weights. `quantization.pack` then stores a model that computes with the same values.

The straight-through gradient: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compression.formats import FourBit, TableFormat
from compression.quantization import Format, embedding_tables, encoder_linears


class _StraightThrough(torch.autograd.Function):
    """Computes with `values`, gives the gradient to `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FakeQuantizedLinear(nn.Linear):
    """A Linear layer that computes with the 4-bit values of its fp32 weight.

    It shares the parameters of the layer it replaces, and the state dict is the same. The values are kept until
    `refresh`, which must follow every optimizer step: fused optimizers change weights without a trace.
    """

    def __init__(self, linear: nn.Linear, format: FourBit):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.format = format
        self._values = torch.empty(0)
        self._made_from: tuple[int, int] | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _StraightThrough.apply(self.weight, self.values), self.bias)

    def refresh(self) -> None:
        """Make the values anew when they are needed next: an optimizer has changed the weight."""
        self._made_from = None

    @property
    def values(self) -> Tensor:
        """[out, in], the 4-bit values of the weight."""
        made_from = (self.weight._version, self.weight.data_ptr())  # tells of loaded states and other devices
        if made_from != self._made_from:
            # Made during an evaluation, the values must still serve the next training step.
            with torch.inference_mode(False), torch.no_grad():
                self._values = self.format.values(self.weight.detach())
            self._made_from = made_from
        return self._values

    def to_plain(self) -> nn.Linear:
        """A plain Linear layer with the same fp32 parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


class FakeQuantizedEmbedding(nn.Embedding):
    """An embedding table that gives its rows as they will be stored; only the rows looked up are quantized."""

    def __init__(self, embedding: nn.Embedding, format: TableFormat):
        nn.Module.__init__(self)
        # All settings of an Embedding are plain attributes.
        self.__dict__.update({name: getattr(embedding, name) for name in nn.Embedding.__constants__})
        self.weight, self.format = embedding.weight, format

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return _StraightThrough.apply(rows, self.format.values(rows.detach()))

    def to_plain(self) -> nn.Embedding:
        """A plain Embedding with the same fp32 table."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self.weight)


def add_fake_quantization(model: PreTrainedModel, storage: Format) -> dict[str, FakeQuantizedLinear]:
    """Let a classifier compute, in place, with the values that `pack` will store; returns its layers by name.

    Quantized are the Linear layers of the encoder and the embedding tables; the classification head stays as it is.

    Raises:
        TypeError: a format of Linear weights that bitsandbytes does not compute with exactly: 8 bits.
        UserError: an architecture that is not supported, or tables that cannot be stored in this format.
    """
    if not isinstance(storage.linears, FourBit):
        raise TypeError(f"training needs 4-bit weights, found {storage.linears}")
    layers = {name: FakeQuantizedLinear(linear, storage.linears) for name, linear in encoder_linears(model).items()}
    tables = {}
    for name, table in embedding_tables(model).items():
        storage.tables.check_width(table.embedding_dim)
        tables[name] = FakeQuantizedEmbedding(table, storage.tables)
    for name, module in (layers | tables).items():
        model.set_submodule(name, module)
    return layers


def remove_fake_quantization(model: PreTrainedModel) -> None:
    """Put plain layers with the fp32 weights back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedLinear | FakeQuantizedEmbedding):
            model.set_submodule(name, module.to_plain())
