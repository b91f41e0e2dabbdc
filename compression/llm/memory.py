"""Sizes of published Llama models, and the memory that pruning and training them takes by formula.

A formula counts the tensors that are there at the peak. What a device needs besides, such as the CUDA context and what
an allocator cannot reuse, is not in it: `fits` leaves a share of the card for that. All sizes are in bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from compression.least_squares import BLOCK
from compression.llm.head import LOGIT_ROWS, TRAINED_ROWS

BF16, FP32, FP64 = 2, 4, 8
NF4 = 0.5 + 1 / 64
"""Of a weight in 4 bits: its code, and its share of a scale that is one byte for 64 weights."""
ADAMW = 4 * FP32
"""Of a weight that is trained: itself, its gradient and the two moments of AdamW, all in float32."""
LAYERS_STREAMED = 2
"""Layers that are on the device at a time: the one that is worked on, and its smaller copy or the next one."""
LEFT_FREE = 0.1
"""Share of a card that is left for what the formulas do not count."""

VOCABULARY = 128_256
"""Tokens of Llama 3 and those after it."""
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LONG_ROPE = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG_ROPE |= {"original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of LLaMA's layout."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    tied: bool = False
    """Whether the head has the embeddings' weights."""
    positions: int = 8192
    scaling: float | None = None
    """How far rotary positions are stretched, as Llama 3.1 and later do; None: not."""
    vocabulary: int = VOCABULARY

    def config(self) -> LlamaConfig:
        """The configuration of a model of these sizes."""
        rope: dict[str, Any] = ROPE if self.scaling is None else LONG_ROPE | {"factor": self.scaling}
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.intermediate,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.positions,
            rope_parameters=rope,
            rms_norm_eps=1e-5,
            dtype="bfloat16",
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer, its two norms left out."""
        queries, keys = self.hidden, self.hidden * self.key_value_heads // self.heads
        return self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate)

    @property
    def table_weights(self) -> int:
        """Weights of the embeddings and of the head, where it has its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """Weights of the model, norms left out."""
        return self.table_weights + self.layers * self.layer_weights

    def pruned_weights(self, ratio: float) -> int:
        """Weights of the model without this share of its layers' parameters."""
        return self.table_weights + round((1 - ratio) * self.layers * self.layer_weights)


SHAPES = {
    "Llama-3.2-1B": Shape(2048, 16, 32, 8, 8192, tied=True, positions=131_072, scaling=32.0),
    "Llama-3-8B": Shape(4096, 32, 32, 8, 14_336),
    "Llama-3-70B": Shape(8192, 80, 64, 8, 28_672),
    "Llama-3.1-405B": Shape(16_384, 126, 128, 8, 53_248, positions=131_072, scaling=8.0),
}


# Parts of the peak.


def layer_activations(shape: Shape, length: int) -> int:
    """What one layer keeps of a window for its backward pass: as much as eleven states and four of the MLP's width in
    bfloat16 (the norms compute in float32)."""
    return BF16 * length * (11 * shape.hidden + 4 * shape.intermediate)


def head_activations(shape: Shape, rows: int = LOGIT_ROWS) -> int:
    """What the head takes for a block of tokens: logits, softmax and gradient, in float32; none of it is kept."""
    return 3 * FP32 * rows * shape.vocabulary


def repair_matrices(shape: Shape, rounds: bool = False) -> int:
    """The repair of a layer that keeps nearly all of its MLP's channels, as some do whatever the ratio: their Gram
    matrix and what they owe in float32, the matrix's Cholesky factor in float64, and both sides for a block of outputs.
    With rounds for gates and ups the larger of that and of theirs: the second moments that precondition, one factored
    in float64 already and the other about to be, and the products of the output projection's columns."""
    channels = shape.intermediate
    plain = FP32 * (channels**2 + channels * shape.hidden) + FP64 * (channels**2 + 2 * channels * BLOCK)
    return max(plain, (2 * FP32 + 2 * FP64) * channels**2) if rounds else plain


def rounds_states(shape: Shape, length: int, windows: int = 64) -> int:
    """What a round for gates and ups keeps of the text: targets and what is missing in float32, what goes in, what a
    change gives, and the derivatives of gates and ups in bfloat16."""
    return windows * length * ((2 * FP32 + 2 * BF16) * shape.hidden + 2 * BF16 * shape.intermediate)


def repair_states(shape: Shape, length: int, windows: int = 64) -> int:
    """The states of the text that a repair is fitted to, in the model as it was and as it becomes, in bfloat16."""
    return 2 * BF16 * windows * length * shape.hidden


# Peaks.


def pruning_in_memory(shape: Shape, length: int = 1024, rounds: bool = False) -> int:
    """Pruning with the whole model on the device: its bfloat16 weights, which are cut down in place, and the larger of
    what the scores and the repair take, the latter with rounds for gates and ups or without."""
    scores = shape.layers * layer_activations(shape, length) + head_activations(shape)
    states = repair_states(shape, length) + (rounds_states(shape, length) if rounds else 0)
    return BF16 * shape.weights + max(scores, repair_matrices(shape, rounds) + states)


def pruning_streamed(shape: Shape, length: int = 1024, rounds: bool = False) -> int:
    """Pruning layer by layer: embeddings, head and two layers in bfloat16, and the larger of what the scores and the
    repair of one layer take, the latter with rounds for gates and ups or without."""
    weights = BF16 * (shape.table_weights + LAYERS_STREAMED * shape.layer_weights)
    scores = layer_activations(shape, length) + head_activations(shape)
    return weights + max(scores, repair_matrices(shape, rounds))


def states_on_disk(shape: Shape, windows: int = 32, length: int = 1024) -> int:
    """The states that enter each layer of a streamed model, of all windows that scores are computed on, in bfloat16."""
    return BF16 * windows * length * shape.hidden * (shape.layers + 1)


def pruning_disk(shape: Shape, ratio: float = 0.5) -> int:
    """What a streamed run takes on the disk: the dense and the pruned checkpoint in bfloat16, and the states."""
    return BF16 * (shape.weights + shape.pruned_weights(ratio)) + states_on_disk(shape)


def training_activations(shape: Shape, length: int) -> int:
    """What a training step keeps of one window with gradient checkpointing: the states between layers and one layer's
    activations in bfloat16, and what the head takes."""
    between = BF16 * shape.layers * length * shape.hidden
    return between + layer_activations(shape, length) + head_activations(shape, TRAINED_ROWS)


def full_recovery(shape: Shape, devices: int = 1, ratio: float = 0.5, length: int = 512) -> int:
    """Training all weights of the pruned model, spread over devices; on several, embeddings, head and one layer are
    gathered too, with their gradients."""
    share = ADAMW * shape.pruned_weights(ratio) // devices
    gathered = 0 if devices == 1 else 2 * FP32 * (shape.table_weights + shape.layer_weights)
    return share + gathered + training_activations(shape, length)


def adapter_weights(shape: Shape, rank: int = 8) -> int:
    """Weights of LoRA adapters on all projections of the dense model."""
    keys = shape.hidden * shape.key_value_heads // shape.heads
    attention = 2 * (shape.hidden + shape.hidden) + 2 * (shape.hidden + keys)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))


def lora_recovery(shape: Shape, four_bits: bool = False, ratio: float = 0.5, length: int = 512) -> int:
    """Training adapters of rank 8 beside the pruned model's frozen weights, in bfloat16 or the layers' in 4 bits."""
    layers = shape.pruned_weights(ratio) - shape.table_weights
    frozen = BF16 * shape.table_weights + round(layers * (NF4 if four_bits else BF16))
    return frozen + ADAMW * adapter_weights(shape) + training_activations(shape, length)


JOBS: dict[str, Callable[[Shape], int]] = {
    "pruning by 50 % in memory": pruning_in_memory,
    "the same with `--mlp_rounds`": lambda shape: pruning_in_memory(shape, rounds=True),
    "pruning by 50 % streamed": pruning_streamed,
    "streamed with `--mlp_rounds`": lambda shape: pruning_streamed(shape, rounds=True),
    "LoRA beside bfloat16": lora_recovery,
    "LoRA beside 4 bits": lambda shape: lora_recovery(shape, four_bits=True),
    "training all weights, 1 device": full_recovery,
    "training all weights, --shard over 8 devices": lambda shape: full_recovery(shape, 8),
    "training all weights, --shard over 16 devices": lambda shape: full_recovery(shape, 16),
}
"""The peak on each device by what is done there."""


def fits(needed: int, card: int) -> bool:
    """Whether a job that needs so many bytes fits a card of so many, with a share of it left free."""
    return needed <= (1 - LEFT_FREE) * card
