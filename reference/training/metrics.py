"""Log the metrics of a run to CSV and TensorBoard, plot the loss curve, and estimate MFU."""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import torch

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import read_text
from gemma3_export.records import Count
from gemma3_export.staging import write_text_atomically

__all__ = [
    "LOG",
    "MetricsLog",
    "StepMetrics",
    "draw_loss_curve",
    "flops_per_token",
    "measure_peak_flops",
    "read_metrics_log",
]

MAX_LOG_BYTES = 2**28
LOG, CURVE = "log.csv", "loss.png"
PROBE_SIZE = 512  # of the matrix product that measures peak FLOPS
PROBE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """The metrics of one step; the validation loss is None if the step was not evaluated."""

    step: Count
    tokens: Count  # seen so far
    train_loss: float
    validation_loss: float | None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    mfu: float  # model FLOPs utilization, relative to the measured peak of this device


class MetricsLog:
    """A CSV file, and optionally TensorBoard, to which a run appends its metrics.

    Args:
        run: folder of the run.
        start_step: step of the checkpoint that the run resumes from; later rows are dropped.
        tensorboard: also write TensorBoard event files.

    Raises:
        UnavailableError: ``tensorboard`` is set and TensorBoard is not installed.
    """

    def __init__(self, run: Path, *, start_step: int, tensorboard: bool) -> None:
        self._path = run / LOG
        rows = [row for row in read_metrics_log(run) if row.step <= start_step]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(field.name for field in fields(StepMetrics))
        writer.writerows(_cells(row) for row in rows)
        write_text_atomically(self._path, buffer.getvalue())
        self._board = _open_tensorboard(run / "tensorboard", start_step) if tensorboard else None

    def add(self, row: StepMetrics) -> None:
        """Append the metrics of one step and flush them."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(_cells(row))
        if self._board is not None:
            for name, value in asdict(row).items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()


def read_metrics_log(run: Path) -> list[StepMetrics]:
    """Read the log of a run, ignoring a last line without a line end.

    Raises:
        InputError: a line is damaged; the message gives its number.
    """
    path = run / LOG
    if not path.exists():
        return []
    text = read_text(path, limit_bytes=MAX_LOG_BYTES)
    complete_lines = text[: text.rfind("\n") + 1]
    names = [field.name for field in fields(StepMetrics)]
    rows: list[StepMetrics] = []
    for number, line in enumerate(complete_lines.splitlines(), 1):
        cells = line.split(",")  # our cells contain no comma and no quote
        if number == 1 and cells == names:
            continue
        try:
            values = {name: cell or None for name, cell in zip(names, cells, strict=True)}
            row = msgspec.convert(values, StepMetrics, strict=False)
        except ValueError as error:  # msgspec's error is one too
            raise _damaged(path, number, str(error)) from error
        if rows and row.step <= rows[-1].step:
            raise _damaged(path, number, f"step {row.step} follows step {rows[-1].step}")
        rows.append(row)
    return rows


def _damaged(path: Path, number: int, what: str) -> InputError:
    return InputError(
        f"{path} is damaged in line {number}: {what:.100}; repair it, or delete it to go on "
        "without the metrics so far"
    )


def draw_loss_curve(run: Path) -> bool:
    """Plot ``loss.png`` from the log; return False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics_log(run)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row.step for row in rows], [row.train_loss for row in rows], lw=1, label="training")
    validation = [
        (row.step, row.validation_loss) for row in rows if row.validation_loss is not None
    ]
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", ms=3, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / CURVE)
    return True


def _cells(row: StepMetrics) -> list[str]:
    # repr is exact, so that the losses of two runs can be compared bit for bit.
    return ["" if value is None else repr(value) for value in asdict(row).values()]


def require_tensorboard() -> None:
    """Raise an error if TensorBoard is not installed.

    Raises:
        UnavailableError: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UnavailableError(
            'TensorBoard is not installed; run: pip install "gemma3-export[train]", or drop '
            "--tensorboard: log.csv has the same metrics"
        )


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1)


def flops_per_token(config: Gemma3Config, context_length: int) -> float:
    """Return the floating-point operations per token of a forward and a backward pass.

    This counts matrix products and attention as in the PaLM paper (arXiv:2204.02311, appendix B),
    except that each attention layer counts the keys it actually sees, which causality and the
    sliding window limit. Recomputation for gradient checkpointing does not count.
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
    """Return the mean number of visible keys over the queries of a sequence."""
    window = min(window, context_length)
    growing = window * (window + 1) / 2
    return (growing + (context_length - window) * window) / context_length


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPS of a large matrix product on ``device``, the reference for MFU.

    A measured peak needs no table of devices and also works for CPUs. The result is the faster of
    ``dtype`` and float32, because some CPUs only emulate half precision.
    """
    return max(_measure_flops(device, kind) for kind in {dtype, torch.float32})


@functools.cache  # the peak of a device does not change within a process
def _measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = PROBE_SIZE * (16 if device.type == "cuda" else 1)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, began = float("inf"), perf_counter()
    while perf_counter() - began < PROBE_SECONDS:
        started = perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # synchronizes with the device
        best = min(best, perf_counter() - started)
    return 2.0 * size**3 / best
