"""Define and validate the options of training data and of a run, which its record stores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from gemma3_export.dtypes import FLOAT_DTYPES
from gemma3_export.errors import InputError
from gemma3_export.limits import BELOW_1, MAX_COUNT, MAX_SEED, check_integer, check_number
from gemma3_export.records import to_record

__all__ = ["LOSS_ON", "PRECISIONS", "SHARDINGS", "LossOn", "Sharding", "TrainOptions"]

LossOn = Literal["answers", "all"]
Sharding = Literal["ddp", "fsdp"]

PRECISIONS = FLOAT_DTYPES
MAX_RATE = 1e30  # beyond it float32 overflows in the first step
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Hyperparameters and intervals of a run; a step is one optimizer step.

    Raises:
        InputError: a value is out of range.
    """

    steps: int = 2000
    batch_size: int = 32  # sequences per micro-batch and process
    context_length: int = 256  # tokens per sequence
    accumulation: int = 1  # micro-batches per step
    learning_rate: float = 1e-3  # peak
    min_learning_rate: float = 1e-4  # at the end of the cosine decay
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-9
    weight_decay: float = 0.1  # applies to matrices only
    clip_norm: float = 1.0  # 0 disables
    precision: str = "fp32"  # of matrix products; weights and optimizer state are always float32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False  # torch.compile
    loss_chunk_tokens: int = 1024  # tokens whose logits are in memory at once
    eval_interval: int = 200  # steps
    eval_batches: int = 16
    sample_interval: int = 0  # steps; 0 disables
    sample_prompt: str = ""
    sample_tokens: int = 64
    checkpoint_interval: int = 200  # steps
    keep_checkpoints: int = 2
    log_interval: int = 10  # steps
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    sharding: Sharding = "ddp"  # across torchrun's processes: replicas (ddp) or shards (fsdp)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "context_length",
            "accumulation",
            "loss_chunk_tokens",
            "eval_interval",
            "eval_batches",
            "checkpoint_interval",
            "keep_checkpoints",
            "log_interval",
            "sample_tokens",
        )
        at_least = dict.fromkeys(counts, 1)
        at_least |= dict.fromkeys(("warmup_steps", "sample_interval", "seed"), 0)
        for name, lowest in at_least.items():
            most = MAX_SEED if name == "seed" else MAX_COUNT
            check_integer(name, getattr(self, name), lowest, most)
        for name in ("learning_rate", "epsilon"):
            check_number(name, getattr(self, name), 0, MAX_RATE, is_open=True)
        for name in ("min_learning_rate", "weight_decay", "clip_norm"):
            check_number(name, getattr(self, name), 0, MAX_RATE)
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), 0, BELOW_1)
        if self.min_learning_rate > self.learning_rate:
            raise InputError(
                f"min_learning_rate ({self.min_learning_rate}) exceeds learning_rate "
                f"({self.learning_rate})"
            )
        for name, known in (("precision", PRECISIONS), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainOptions:
        """Create options from the result of :meth:`to_json`.

        Raises:
            InputError: a value is missing, unknown or of the wrong type.
        """
        if wrong := sorted(data.keys() ^ {field.name for field in fields(cls)}):
            raise InputError(
                "the training options are of another version, with unknown or missing fields: "
                f"{', '.join(wrong)}; start a new run"
            )
        return to_record(data, cls, where="the record of the options", remedy="start a new run")
