"""The log of a run: a CSV file that survives resuming, a loss curve, and TensorBoard if wanted."""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import UnavailableError
from gemma3_export.staging import write_text_atomically

__all__ = [
    "LOG",
    "LogRow",
    "Logbook",
    "draw_loss_curve",
    "flops_per_token",
    "measure_peak_flops",
    "read_log",
]

LOG, CURVE = "log.csv", "loss.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRow:
    """One line of the log; None where a step did not measure something."""

    step: int
    tokens: int  # trained on so far
    train_loss: float
    validation_loss: float | None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    mfu: float  # model flops utilisation, of the matrix product's peak measured here


class Logbook:
    """Appends rows; opening it for a resumed run drops the rows after the checkpoint's step.

    Raises:
        UnavailableError: TensorBoard is wanted and not installed.
    """

    def __init__(self, run: Path, *, start_step: int, tensorboard: bool) -> None:
        self._path = run / LOG
        rows = [row for row in read_log(run) if row.step <= start_step]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(field.name for field in fields(LogRow))
        writer.writerows(_cells(row) for row in rows)
        write_text_atomically(self._path, buffer.getvalue())
        self._board = _open_tensorboard(run / "tensorboard", start_step) if tensorboard else None

    def add(self, row: LogRow) -> None:
        """Write one row, at once."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(_cells(row))
        if self._board is not None:
            for name, value in asdict(row).items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Finish the files."""
        if self._board is not None:
            self._board.close()


def read_log(run: Path) -> list[LogRow]:
    """The rows of a run's log; a last line that was cut off is left out."""
    path = run / LOG
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [
        LogRow(
            step=int(line["step"]),
            tokens=int(line["tokens"]),
            train_loss=float(line["train_loss"]),
            validation_loss=float(line["validation_loss"]) if line["validation_loss"] else None,
            learning_rate=float(line["learning_rate"]),
            gradient_norm=float(line["gradient_norm"]),
            tokens_per_second=float(line["tokens_per_second"]),
            mfu=float(line["mfu"]),
        )
        for line in csv.DictReader(io.StringIO(whole))
    ]


def draw_loss_curve(run: Path) -> bool:
    """Draw ``loss.png`` from the log; False when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_log(run)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row.step for row in rows], [row.train_loss for row in rows], lw=1, label="training")
    held = [(row.step, row.validation_loss) for row in rows if row.validation_loss is not None]
    if held:
        axes.plot(*zip(*held, strict=True), marker="o", ms=3, label="validation")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("cross-entropy (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / CURVE)
    return True


def _cells(row: LogRow) -> list[str]:
    # repr keeps every bit, so that two runs can be compared exactly.
    return ["" if value is None else repr(value) for value in asdict(row).values()]


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise UnavailableError(
            'TensorBoard is not installed; run: pip install "gemma3-export[train]", or leave '
            "--tensorboard away: log.csv has the same numbers"
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1)


# How fast training is, and which share of the machine's arithmetic it uses.

PROBE_SIZE = 512
PROBE_SECONDS = 0.3


def flops_per_token(config: Gemma3Config, context_length: int) -> float:
    """Multiplications and additions of forward and backward pass for one token of a window.

    Counts matrix products and attention, as the PaLM paper does (arXiv:2204.02311, appendix B), but
    each attention layer for the keys it really sees: on average half the window, or the sliding
    window where that is shorter. Recomputation does not count.
    """
    head_or_embedding = config.vocab_size * config.hidden_size
    matrices = sum(
        shape[0] * shape[1] for _, shape in config.weight_shapes() if len(shape) == 2
    ) - head_or_embedding * (0 if config.tie_word_embeddings else 1)
    attention = 0.0
    for layer in range(config.num_hidden_layers):
        window = config.sliding_window if config.is_sliding(layer) else context_length
        attention += 2 * config.query_size * _mean_keys(context_length, window)
    return 6.0 * (matrices + attention)


def _mean_keys(context_length: int, window: int) -> float:
    """Keys that a query of a window of text sees, on average."""
    window = min(window, context_length)
    growing = window * (window + 1) / 2
    return (growing + (context_length - window) * window) / context_length


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a large matrix product reaches here: what MFU is a share of.

    A measured peak needs no table of devices, and holds for a processor as well. On one without
    arithmetic in ``dtype``, float32 is the faster of the two, and what decides.
    """
    return max(_probe(device, kind) for kind in {dtype, torch.float32})


@functools.cache  # a device does not change while a process lives
def _probe(device: torch.device, dtype: torch.dtype) -> float:
    size = PROBE_SIZE * (16 if device.type == "cuda" else 1)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, began = float("inf"), perf_counter()
    while perf_counter() - began < PROBE_SECONDS:
        started = perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        best = min(best, perf_counter() - started)
    return 2.0 * size**3 / best
