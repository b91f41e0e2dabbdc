"""What a recovery training does, and which settings of it go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from compression.config import NO_EFFECT, AtLeast, Originally, Settings
from compression.llm.agreement import Agreement
from compression.llm.evaluate import Evaluation
from compression.llm.mixture import Weighted, check_one_of_each, parse_mixture
from compression.llm.rows import is_instruction_file
from compression.runtime import Dtype, UserError, processes
from compression.schedule import ScheduleName
from compression.training import Training

LEARNING_RATE = 4e-4
"""The default, for adapters and for all weights (docs/results.md)."""
EVALUATIONS = ("ppl", "zeroshot")
"""What can be measured before and after."""


@dataclass
class Recovery(Settings):
    """What a recovery training does. The fields are documented in post_training.py, where their defaults are."""

    finetune_method: Literal["lora", "full"]
    finetune_samples: int
    tokens: Annotated[int | None, Originally(None)]
    dataset: str
    train_on_inputs: bool
    max_length: int
    packing: Annotated[bool, Originally(False)]
    validation_dataset: str | None
    validation_samples: int
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_projections: str
    lora_rank_by_share: Annotated[bool, Originally(False)]
    load_in_4bit: bool
    dtype: Dtype
    kd_weight: float
    kd_temperature: float
    hidden_weight: Annotated[float, Originally(0.0)]
    teacher: Annotated[Path | None, NO_EFFECT]
    teacher_offload: Annotated[Literal["none", "cpu", "disk"], NO_EFFECT]
    teacher_cache: Annotated[int, AtLeast(0), Originally(0)]
    shard: Annotated[bool, NO_EFFECT]
    schedule: Annotated[ScheduleName, Originally("linear")]
    training: Training
    evaluation: Evaluation
    agreement: Agreement

    def check(self) -> None:
        self.evaluation.check_allowed(EVALUATIONS)
        self._check_texts()
        self.agreement.check_unseen([text.name for text in self.texts])
        if self.finetune_method == "full" and self.load_in_4bit:
            raise UserError("--load_in_4bit: not allowed with --finetune_method full; use --finetune_method lora")
        if self.finetune_method == "full" and self.dtype not in ("auto", "float32"):
            raise UserError(
                f"--dtype {self.dtype}: with --finetune_method full allowed is auto or float32, for 16 bits lose small "
                "updates; use --amp bf16 to compute in them"
            )
        if self.shard and self.load_in_4bit:
            raise UserError(
                "--shard: not allowed with --load_in_4bit, whose weights are stored in blocks; leave one out"
            )
        if self.lora_rank_by_share and self.finetune_method == "full":
            raise UserError("--lora_rank_by_share: not allowed with --finetune_method full; leave one out")
        if self.hidden_weight and self.teacher_cache:
            raise UserError(
                f"--teacher_cache {self.teacher_cache}: keeps no hidden states; not allowed with --hidden_weight"
            )
        if self.teacher_cache and not self.kd_weight:
            raise UserError(
                f"--teacher_cache {self.teacher_cache}: is used with --kd_weight above 0 alone; give that too"
            )
        if self.teacher_offload != "none" and not self.learns:
            raise UserError(
                f"--teacher_offload {self.teacher_offload}: is used with --kd_weight or --hidden_weight above 0 alone; "
                "give one of them too"
            )
        if self.teacher is not None and self.needs_dense is None and not self.compares:
            raise UserError(
                f"--teacher {self.teacher}: is used with --kd_weight or --hidden_weight above 0, with "
                "--lora_rank_by_share or with --agreement_text alone; give one of them too"
            )

    def _check_texts(self) -> None:
        texts = self.texts
        if self.validation_dataset is not None:
            parse_mixture(self.validation_dataset, "--validation_dataset")
        if self.tokens:
            self.check_tokens("tokens", self.tokens)
        else:
            check_one_of_each("finetune_samples", self.finetune_samples, texts)
        if self.packing and self.instructions is None:
            raise UserError(
                f"--packing: is for instructions (.json, .jsonl); the windows of --dataset {self.dataset}, a text, are "
                "full without it: leave it out"
            )
        if self.packing and self.teacher_cache:
            raise UserError(f"--packing: not allowed with --teacher_cache {self.teacher_cache}; leave one out")
        if is_instruction_file(self.validation_dataset or ""):
            raise UserError(f"--validation_dataset {self.validation_dataset}: allowed is plain text, not instructions")

    def check_tokens(self, flag: str, tokens: int) -> None:
        """Raise UserError where a budget of tokens to predict, given by a flag, is too small for the texts."""
        check_one_of_each(flag, tokens, self.texts, self.max_length - 1)

    @property
    def texts(self) -> list[Weighted]:
        """What is trained on."""
        return parse_mixture(self.dataset)

    @property
    def instructions(self) -> Path | None:
        """The file of instructions, where nothing else is trained on; beside texts it is one of them."""
        text, *others = self.texts
        return Path(text.name) if not others and is_instruction_file(text.name) else None

    @property
    def learns(self) -> bool:
        """Whether anything is learned from a teacher."""
        return bool(self.kd_weight or self.hidden_weight)

    @property
    def compares(self) -> bool:
        """Whether predictions are compared with the dense model's, before and after."""
        return self.agreement.agreement_text != "none" and self.evaluation.run_evaluation != "none"

    @property
    def needs_dense(self) -> str | None:
        """The flag that needs the dense model, if one does."""
        flags = ("kd_weight", "hidden_weight", "lora_rank_by_share")
        return next((f"--{flag}" for flag in flags if getattr(self, flag)), None)

    def in_one_epoch(self) -> "Recovery":
        """The same; a budget of tokens is spent in one epoch."""
        return self.updated(num_epochs=1) if self.tokens else self

    @property
    def projections(self) -> list[str]:
        return self.lora_projections.split(",")

    @property
    def spread(self) -> bool:
        """Whether the model is spread over processes; a single one has all of it."""
        return self.shard and processes().num_processes > 1

    @property
    def states_of(self) -> str | int:
        """By which processes a killed run can be resumed: any, or this number of them."""
        return "any" if self.shard else processes().num_processes
