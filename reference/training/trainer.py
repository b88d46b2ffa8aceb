"""The training loop: accumulate, clip, step, evaluate, sample, save."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma3_export.dtypes import torch_dtype
from gemma3_export.errors import Gemma3ExportError, UnavailableError
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.training.checkpoints import save_checkpoint
from gemma3_export.reference.training.distributed import (
    Ranks,
    clip_gradients,
    distribute,
    load_state,
    synchronised_only,
    whole_model,
    whole_optimizer,
)
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.metrics_log import (
    Logbook,
    LogRow,
    flops_per_token,
    measure_peak_flops,
)
from gemma3_export.reference.training.model_folder import write_weights
from gemma3_export.reference.training.optimizer import (
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.token_data import (
    TRAIN_STREAM,
    VALIDATION_STREAM,
    TokenData,
    Windows,
)
from gemma3_export.runtimes.generation.loop import GenerationOptions, generate
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.signals import StopSignals
from gemma3_export.tokenizer import StreamingDecoder, Tokenizer

__all__ = [
    "Progress",
    "Trainer",
    "compile_in_place",
    "sample_text",
]


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is: the part of its state that is plain numbers."""

    step: int = 0  # updates made; with the seed, also the position in the data
    seconds: float = 0.0  # in training steps, without evaluation and saving
    best_step: int = 0
    best_validation_loss: float = math.inf
    validation_loss: float | None = None  # the latest


class Trainer:
    """One process's part of a run.

    Args:
        options: how to train.
        data: tokens.
        model: float32 weights to begin with.
        run: the run's folder; the first process writes there.
        ranks: this process among its peers.
        report: told what people should see, one line at a time.

    Raises:
        InputError: there is too little text.
        UnavailableError: the model is to be compiled, and nothing can be compiled here.
    """

    def __init__(
        self,
        options: TrainOptions,
        data: TokenData,
        model: Gemma3,
        run: Path,
        ranks: Ranks,
        report: Callable[[str], None],
    ) -> None:
        self.options, self.data, self.run_folder, self.ranks = options, data, run, ranks
        self.report = report if ranks.is_first else (lambda line: None)
        self.progress = Progress()
        self.train_windows = self._windows(data.train, TRAIN_STREAM)
        self.held_windows = (
            None if data.validation is None else self._windows(data.validation, VALIDATION_STREAM)
        )
        compute_dtype = torch_dtype(options.precision)
        self.module = LossModule(
            model.to(ranks.device).train(),
            compute_dtype=compute_dtype,
            loss_chunk_tokens=options.loss_chunk_tokens,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        if options.compile:
            compile_in_place(self.module, ranks.device)
        self.wrapped = distribute(self.module, ranks, options.sharding)
        self.optimizer = make_optimizer(self.wrapped, options)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.precision == "fp16")
        self._flops = flops_per_token(model.config, options.context_length)
        self._peak_flops = measure_peak_flops(ranks.device, compute_dtype) * ranks.world_size

    def run(self, logbook: Logbook | None) -> None:
        """Train to the last step, or until a signal; what there is then is saved.

        Args:
            logbook: the first process's; None elsewhere.

        Raises:
            Gemma3ExportError: the loss is no number any more, or the disk is full.
        """
        with StopSignals() as signals:
            while self.progress.step < self.options.steps:
                self._advance(logbook)
                if stop := self.ranks.highest(signals.received):
                    signals.received = stop
                    self.save()
                    self.report(f"stopped by a signal; step {self.progress.step} is saved")
                    break
        signals.deliver()

    def _advance(self, logbook: Logbook | None) -> None:
        options, progress = self.options, self.progress
        started = perf_counter()
        loss, norm = self.update()
        elapsed = perf_counter() - started
        progress.seconds += elapsed
        step, is_last = progress.step, progress.step == options.steps
        held: float | None = None
        if self.held_windows is not None and (step % options.eval_interval == 0 or is_last):
            held = self.evaluate()
            self._keep_best(held)
        if logbook is not None and (held is not None or step % options.log_interval == 0):
            self._log(logbook, loss, norm, held, elapsed)
        if options.sample_interval and step % options.sample_interval == 0:
            self._sample()
        if step % options.checkpoint_interval == 0 or is_last:
            self.save()

    def update(self) -> tuple[float, float]:
        """One step over all micro-batches and processes; its mean loss and gradient norm.

        Raises:
            Gemma3ExportError: the loss or a gradient is no finite number.
        """
        options, step = self.options, self.progress.step
        total = torch.zeros((), device=self.ranks.device)
        for micro in range(options.accumulation):
            inputs, labels = self._batch(self.train_windows, step * options.accumulation + micro)
            is_last = micro == options.accumulation - 1
            with synchronised_only(self.wrapped, last=is_last):
                loss = self.wrapped(inputs, labels)
                self.scaler.scale(loss / options.accumulation).backward()
            total += loss.detach() / options.accumulation
        mean_loss = self.ranks.mean(total)
        self.scaler.unscale_(self.optimizer)  # clipping must see the true gradients
        norm = float(clip_gradients(self.module, options.clip_norm))
        # With a scaler, infinite gradients are its cue to skip this step and scale less.
        if not math.isfinite(mean_loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            self._give_up(mean_loss, norm)
        set_learning_rate(self.optimizer, learning_rate(step, options))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return mean_loss, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the same windows of held-out text each time; trains nothing, draws nothing.

        The draws come from a stream of their own, so how often one evaluates changes no training.
        """
        assert self.held_windows is not None
        losses = [
            self.module(*self._batch(self.held_windows, index))
            for index in range(self.options.eval_batches)
        ]
        return self.ranks.mean(torch.stack(losses).mean())

    def save(self) -> None:
        """Write a checkpoint; every process must call this."""
        weights = whole_model(self.module)
        optimizer = whole_optimizer(self.module, self.optimizer)
        if not self.ranks.is_first:
            return
        if not (self.run_folder / "model.safetensors").exists() or self.held_windows is None:
            write_weights(self.run_folder, weights, torch.float32)
        state = {
            "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            "model": weights,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "random": random_states(self.ranks.device),
        }
        step, keep = self.progress.step, self.options.keep_checkpoints
        save_checkpoint(self.run_folder, step, state, keep=keep)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`save` wrote."""
        load_state(self.module, self.optimizer, state["model"], state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"], self.ranks.device)
        self.progress = Progress(**state["progress"])

    def _keep_best(self, held: float) -> None:
        """Make the weights the run's model if none before them were as good."""
        self.progress.validation_loss = held
        if held >= self.progress.best_validation_loss:
            return
        self.progress.best_validation_loss = held
        self.progress.best_step = self.progress.step
        weights = whole_model(self.module)
        if self.ranks.is_first:
            write_weights(self.run_folder, weights, torch.float32)

    def _log(
        self, logbook: Logbook, loss: float, norm: float, held: float | None, elapsed: float
    ) -> None:
        options, step = self.options, self.progress.step
        per_step = options.batch_size * options.context_length * options.accumulation
        per_step *= self.ranks.world_size
        row = LogRow(
            step=step,
            tokens=step * per_step,
            train_loss=loss,
            validation_loss=held,
            learning_rate=learning_rate(step - 1, options),
            gradient_norm=norm,
            tokens_per_second=per_step / elapsed,
            mfu=self._flops * per_step / elapsed / self._peak_flops,
        )
        logbook.add(row)
        validation = "" if held is None else f"  validation {held:.4f}"
        self.report(
            f"step {step:>6}/{options.steps}  loss {loss:.4f}{validation}  "
            f"lr {row.learning_rate:.2e}  norm {norm:.2f}  "
            f"{row.tokens_per_second:,.0f} tok/s  MFU {row.mfu:.0%}"
        )

    def _sample(self) -> None:
        if self.options.sharding == "fsdp" and not self.ranks.is_alone:
            return  # no process has the whole model
        tokenizer = self.data.tokenizer()
        if self.ranks.is_first and tokenizer is not None:
            prompt, length = self.options.sample_prompt, self.options.sample_tokens
            text = sample_text(self.module.model, tokenizer, prompt, length, self.options.seed)
            self.report(f"sample: {text!r}")

    def _give_up(self, loss: float, norm: float) -> None:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        raise Gemma3ExportError(
            f"the {what} at step {self.progress.step + 1}; training stopped, and the last "
            "checkpoint before it is kept. Lower the learning rate or use bf16 instead of fp16"
        )

    def _windows(self, tokens: Any, stream: int) -> Windows:
        return Windows(
            tokens,
            context_length=self.options.context_length,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            stream=stream,
        )

    def _batch(self, windows: Windows, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rank, world_size = self.ranks.rank, self.ranks.world_size
        inputs, labels = windows.batch(index, rank=rank, world_size=world_size)
        return inputs.to(self.ranks.device), labels.to(self.ranks.device)


def random_states(device: torch.device) -> dict[str, Any]:
    """Everything random that a process has, in types that load without running code."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# Text from a model in training, by the same loop that serves the exported one.

TEMPERATURE, TOP_K = 0.8, 64


def sample_text(
    model: Gemma3, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Continue ``prompt``, which may be empty; the sampler's draws touch no global state."""
    ids = tokenizer.encode(prompt)
    if not ids:  # a tokenizer without <bos>: a document also begins after the end of another
        assert tokenizer.eos_token_id is not None
        ids = [tokenizer.eos_token_id]
    was_training = model.training
    generation = generate(
        ReferenceRuntime(model),
        [ids],
        SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, seed=seed),
        GenerationOptions(max_new_tokens=max_new_tokens),
        detokenize=lambda: StreamingDecoder(tokenizer),
    )
    text = generation.collect()[0].text
    model.train(was_training)
    return prompt + text


# torch.compile, refused before a run begins where it cannot work.


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Have ``module`` compiled on its first calls.

    Raises:
        UnavailableError: a trivial function cannot be compiled, for want of a C++ compiler or of
            Triton, say.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    # Inductor, Triton and the compilers that they start fail in many ways.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnavailableError(
            f"--compile does not work here ({reason[0]:.200}); on a CPU it needs a C++ compiler "
            "such as g++, on CUDA Triton as well: install them, or leave --compile away"
        ) from error
    module.compile()


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1
