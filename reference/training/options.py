"""Everything that a training run can be told, in one record that is stored with its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from gemma3_export.dtypes import FLOAT_DTYPES
from gemma3_export.errors import InputError

__all__ = ["PRECISIONS", "SHARDINGS", "TrainOptions"]

PRECISIONS = FLOAT_DTYPES
SHARDINGS = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How to train; a step is one update of the weights, whatever it accumulates.

    Raises:
        InputError: a value is impossible.
    """

    steps: int = 2000
    batch_size: int = 32  # windows of text in one micro-batch of one process
    context_length: int = 256  # tokens of a window
    accumulation: int = 1  # micro-batches a step
    learning_rate: float = 1e-3  # the highest
    min_learning_rate: float = 1e-4  # where the cosine ends
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-9
    weight_decay: float = 0.1  # of matrices only
    clip_norm: float = 1.0  # 0 is off
    precision: str = "fp32"  # of the computation; weights and optimiser are always float32
    gradient_checkpointing: bool = False  # compute layers twice instead of keeping activations
    compile: bool = False  # torch.compile
    loss_chunk_tokens: int = 1024  # logits that exist at a time
    eval_interval: int = 200  # steps
    eval_batches: int = 16
    sample_interval: int = 0  # steps; 0 is off
    sample_prompt: str = ""
    sample_tokens: int = 64
    checkpoint_interval: int = 200  # steps
    keep_checkpoints: int = 2
    log_interval: int = 10  # steps
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    sharding: str = "ddp"  # what torchrun's processes share: nothing (ddp) or everything (fsdp)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts: tuple[str, ...] = (
            "steps",
            "batch_size",
            "context_length",
            "accumulation",
            "loss_chunk_tokens",
        )
        counts += ("eval_interval", "eval_batches", "checkpoint_interval", "keep_checkpoints")
        counts += ("log_interval", "sample_tokens")
        at_least = dict.fromkeys(counts, 1)
        at_least |= dict.fromkeys(("warmup_steps", "sample_interval", "seed"), 0)
        for name, lowest in at_least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("min_learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be within 0 and 1")
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
        """The form that checkpoints and records store."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainOptions:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: a value is missing, unknown or of the wrong type.
        """
        kinds = get_type_hints(cls)
        if wrong := sorted(data.keys() ^ {field.name for field in fields(cls)}):
            raise InputError(f"training options do not fit this version: {', '.join(wrong)}")
        for name, value in data.items():
            if type(value) is not kinds[name] and not (kinds[name] is float and value == 0):
                raise InputError(f"training option {name} is {value!r:.60}, no {kinds[name]}")
        return cls(**data)
