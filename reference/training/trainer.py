"""Train a model: accumulate gradients, clip, step, evaluate, sample and save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.config import SAFE_WEIGHTS_NAME
from gemma3_export.dtypes import torch_dtype
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.training.checkpoints import (
    get_rng_states,
    save_checkpoint,
    set_rng_states,
)
from gemma3_export.reference.training.distributed import (
    ProcessGroup,
    clip_grad_norm,
    full_model_state_dict,
    full_optimizer_state_dict,
    gradient_sync,
    load_full_state_dicts,
    parallelize,
)
from gemma3_export.reference.training.example_batches import PADDING, ExampleSampler
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.metrics import (
    MetricsLog,
    StepMetrics,
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
    IGNORED_LABEL,
    TRAIN_STREAM,
    VALIDATION_STREAM,
    Batch,
    TokenData,
    WindowSampler,
)
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.signals import DeferredSignals
from gemma3_export.tokenizer import StreamingDecoder, Tokenizer

__all__ = ["TrainState", "Trainer", "compile_in_place", "sample_text"]

SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 64

Sampler = WindowSampler | ExampleSampler


@dataclass(kw_only=True, slots=True)
class TrainState:
    """The counters of a run, stored in its checkpoints."""

    step: int = 0  # optimizer steps so far; with the seed, also the position in the data
    tokens: int = 0  # seen so far, without padding
    seconds: float = 0.0  # spent in training steps, excluding evaluation and saving
    best_step: int = 0
    best_validation_loss: float = math.inf
    validation_loss: float | None = None  # of the latest evaluation


class Trainer:
    """The training loop of one process.

    Args:
        options: hyperparameters and intervals.
        data: tokens to train on.
        model: initial weights in float32.
        run: folder of the run; only the main process writes to it.
        group: the processes that train together.
        report: receives log messages, one line per call; used in the main process only.

    Raises:
        InputError: the text is too short for the batch size and context length.
        UnavailableError: ``options.compile`` is set and torch.compile does not work here.
    """

    def __init__(
        self,
        options: TrainOptions,
        data: TokenData,
        model: Gemma3,
        run: Path,
        group: ProcessGroup,
        report: Callable[[str], None],
    ) -> None:
        self.options, self.data, self.run_folder, self.group = options, data, run, group
        self.report = report if group.is_main_process else (lambda line: None)
        self.state = TrainState()
        train_sampler = self._sampler("train", TRAIN_STREAM)
        assert train_sampler is not None  # token folders without training tokens do not open
        self.train_sampler = train_sampler
        self.validation_sampler = self._sampler("validation", VALIDATION_STREAM)
        compute_dtype = torch_dtype(options.precision)
        self.module = LossModule(
            model.to(group.device).train(),
            compute_dtype=compute_dtype,
            loss_chunk_tokens=options.loss_chunk_tokens,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        if options.compile:
            compile_in_place(self.module, group.device)
        self.wrapped = parallelize(self.module, group, options.sharding)
        self.optimizer = make_optimizer(self.wrapped, options)
        self.scaler = torch.amp.GradScaler(
            group.device.type, enabled=compute_dtype == torch.float16
        )
        self._flops = flops_per_token(model.config, options.context_length)
        self._peak_flops = measure_peak_flops(group.device, compute_dtype) * group.world_size

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step, over all micro-batches and processes."""
        options = self.options
        per_process = options.batch_size * options.context_length * options.accumulation
        return per_process * self.group.world_size

    def run(self, metrics_log: MetricsLog | None) -> None:
        """Train until the last step, or until SIGTERM or Ctrl-C; save a checkpoint in either case.

        Args:
            metrics_log: the log of the main process; None in the others.

        Raises:
            Gemma3ExportError: the loss or a gradient is not finite, or the disk is full.
        """
        with DeferredSignals() as signals:
            while self.state.step < self.options.steps:
                self._advance(metrics_log)
                if stop := self.group.all_reduce_max(signals.received):
                    signals.received = stop
                    self.save()
                    self.report(f"stopped by a signal after step {self.state.step}, which is saved")
                    break
        signals.raise_received()

    def _advance(self, metrics_log: MetricsLog | None) -> None:
        options, state = self.options, self.state
        started, tokens = perf_counter(), -state.tokens
        loss, norm = self.update()
        elapsed = perf_counter() - started
        tokens += state.tokens
        state.seconds += elapsed
        step, is_last = state.step, state.step == options.steps
        validation_loss: float | None = None
        if self.validation_sampler is not None and (step % options.eval_interval == 0 or is_last):
            validation_loss = self.evaluate()
            self._keep_best(validation_loss)
        is_logged = validation_loss is not None or step % options.log_interval == 0
        if metrics_log is not None and is_logged:
            self._log(metrics_log, loss, norm, validation_loss, tokens / elapsed)
        if options.sample_interval and step % options.sample_interval == 0:
            self._sample()
        if step % options.checkpoint_interval == 0 or is_last:
            self.save()

    def update(self) -> tuple[float, float]:
        """Make one optimizer step; return its mean loss and the gradient norm before clipping.

        Raises:
            Gemma3ExportError: the loss or a gradient is not finite.
        """
        options, step = self.options, self.state.step
        batches = [
            self._batch(self.train_sampler, step * options.accumulation + micro)
            for micro in range(options.accumulation)
        ]
        # The mean over all labels of the step. DDP and FSDP average the gradients of processes.
        learned, tokens = self._count(batches).tolist()
        divisor = torch.tensor(
            max(1, learned) / self.group.world_size, dtype=torch.float32, device=self.group.device
        )
        total = torch.zeros((), device=self.group.device)
        for micro, batch in enumerate(batches):
            is_last = micro == options.accumulation - 1
            with gradient_sync(self.wrapped, enabled=is_last):
                loss = self.wrapped(*batch, divisor)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        mean_loss = self.group.all_reduce_mean(total)
        self.scaler.unscale_(self.optimizer)  # clip the true gradients, not the scaled ones
        norm = float(clip_grad_norm(self.module, options.clip_norm))
        # On infinite gradients an fp16 scaler skips the step and lowers its scale.
        if not math.isfinite(mean_loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            self._raise_not_finite(mean_loss, norm)
        set_learning_rate(self.optimizer, learning_rate(step, options))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += tokens
        return mean_loss, norm

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """Return how many tokens all processes learn, and how many they see, as int64."""
        learned = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        seen = sum(
            batch.input_ids.numel()
            if batch.documents is None
            else int((batch.documents != PADDING).sum())
            for batch in batches
        )
        return self.group.all_reduce_sum(torch.tensor([learned, seen], device=self.group.device))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss over validation text, which is the same in every call.

        It is drawn from a separate random stream, so evaluation does not affect training.
        """
        sampler, count = self.validation_sampler, self.options.eval_batches
        assert sampler is not None
        if isinstance(sampler, ExampleSampler):
            count = min(count, sampler.num_batches(self.group.world_size))
        one = torch.ones((), device=self.group.device)
        losses, learned = torch.zeros((2, count), dtype=torch.float64)
        for index in range(count):
            batch = self._batch(sampler, index, wraps=False)
            losses[index] = self.module(*batch, one)
            learned[index] = (batch.labels != IGNORED_LABEL).sum()
        sums = torch.stack((losses.sum(), learned.sum())).to(self.group.device)
        loss, tokens = self.group.all_reduce_sum(sums)
        return float(loss / tokens.clamp(min=1))

    def save(self) -> None:
        """Write a checkpoint. Every process must call this."""
        weights = full_model_state_dict(self.module)
        optimizer = full_optimizer_state_dict(self.module, self.optimizer)
        if not self.group.is_main_process:
            return
        if not (self.run_folder / SAFE_WEIGHTS_NAME).exists() or self.validation_sampler is None:
            write_weights(self.run_folder, weights, torch.float32)
        state = {
            "progress": asdict(self.state),
            "model": weights,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "random": get_rng_states(self.group.device),
        }
        step, keep = self.state.step, self.options.keep_checkpoints
        save_checkpoint(self.run_folder, step, state, keep=keep)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`save` wrote.

        Raises:
            InputError: it is the state of something else.
        """
        try:
            load_full_state_dicts(self.module, self.optimizer, state["model"], state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            set_rng_states(state["random"], self.group.device)
            progress = state["progress"]
            self.state = TrainState(**progress)
            if "tokens" not in progress:  # of a version that trained on windows of text only
                self.state.tokens = self.state.step * self.tokens_per_step
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"the checkpoint in {self.run_folder} does not hold the state of this run "
                f"({what:.200}); start a new run"
            ) from error

    def _keep_best(self, validation_loss: float) -> None:
        """Write the weights to the run's folder if they have the lowest validation loss so far."""
        self.state.validation_loss = validation_loss
        if validation_loss >= self.state.best_validation_loss:
            return
        self.state.best_validation_loss = validation_loss
        self.state.best_step = self.state.step
        weights = full_model_state_dict(self.module)
        if self.group.is_main_process:
            write_weights(self.run_folder, weights, torch.float32)

    def _log(
        self,
        metrics_log: MetricsLog,
        loss: float,
        norm: float,
        validation_loss: float | None,
        tokens_per_second: float,
    ) -> None:
        options, step = self.options, self.state.step
        row = StepMetrics(
            step=step,
            tokens=self.state.tokens,
            train_loss=loss,
            validation_loss=validation_loss,
            learning_rate=learning_rate(step - 1, options),
            gradient_norm=norm,
            tokens_per_second=tokens_per_second,
            mfu=self._flops * tokens_per_second / self._peak_flops,
        )
        metrics_log.add(row)
        validation = "" if validation_loss is None else f"  validation {validation_loss:.4f}"
        self.report(
            f"step {step:>6}/{options.steps}  loss {loss:.4f}{validation}  "
            f"lr {row.learning_rate:.2e}  norm {norm:.2f}  "
            f"{row.tokens_per_second:,.0f} tok/s  MFU {row.mfu:.0%}"
        )

    def _sample(self) -> None:
        if self.options.sharding == "fsdp" and self.group.is_distributed:
            return  # no process holds the full model
        tokenizer = self.data.tokenizer()
        if self.group.is_main_process and tokenizer is not None:
            prompt, length = self.options.sample_prompt, self.options.sample_tokens
            text = sample_text(self.module.model, tokenizer, prompt, length, self.options.seed)
            self.report(f"sample: {text!r}")

    def _raise_not_finite(self, loss: float, norm: float) -> None:
        value = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        raise Gemma3ExportError(
            f"the {value} at step {self.state.step + 1}; training stopped, and the last "
            "checkpoint is kept. Lower the learning rate or use bf16 instead of fp16"
        )

    def _sampler(self, split: str, stream: int) -> Sampler | None:
        tokens, marks = self.data.split(split)
        if tokens is None:
            return None
        options = self.options
        if marks is None:
            return WindowSampler(
                tokens,
                context_length=options.context_length,
                batch_size=options.batch_size,
                seed=options.seed,
                stream=stream,
            )
        return ExampleSampler(
            tokens,
            marks,
            context_length=options.context_length,
            batch_size=options.batch_size,
            seed=options.seed,
            stream=stream,
        )

    def describe_data(self) -> None:
        """Report how much of the examples is learned; windows of text are learned whole."""
        sampler = self.train_sampler
        if not isinstance(sampler, ExampleSampler):
            return
        length, total = self.options.context_length, sampler.tokens.size
        learned, rows = sampler.learned_tokens, sampler.rows
        what = "answers" if self.data.meta.loss_on == "answers" else "learned"
        self.report(
            f"data: {learned:,} of {total:,} tokens are {what} ({learned / total:.0%}), in "
            f"{len(rows.spans):,} rows of up to {length} tokens"
        )
        if rows.split_documents:
            self.report(
                f"data: {rows.split_documents:,} examples are longer than --context-length "
                f"{length}; their later parts are learned without their beginnings"
            )

    def _batch(self, sampler: Sampler, index: int, *, wraps: bool = True) -> Batch:
        rank, world_size = self.group.rank, self.group.world_size
        if isinstance(sampler, WindowSampler):
            batch = sampler.batch(index, rank=rank, world_size=world_size)
        else:
            batch = sampler.batch(index, rank=rank, world_size=world_size, wraps=wraps)
        documents = None if batch.documents is None else batch.documents.to(self.group.device)
        inputs, labels = batch.input_ids, batch.labels
        return Batch(inputs.to(self.group.device), labels.to(self.group.device), documents)


def sample_text(
    model: Gemma3, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """Return ``prompt``, which may be empty, with a sampled continuation.

    Sampling leaves the global random state alone.
    """
    ids = tokenizer.encode(prompt)
    if not ids:  # without <bos>, a new document follows the <eos> of another one
        assert tokenizer.eos_token_id is not None
        ids = [tokenizer.eos_token_id]
    was_training = model.training
    generation = generate(
        ReferenceRuntime(model),
        [ids],
        SamplingParams(temperature=SAMPLE_TEMPERATURE, top_k=SAMPLE_TOP_K, seed=seed),
        GenerationOptions(max_new_tokens=max_new_tokens),
        detokenize=lambda: StreamingDecoder(tokenizer),
    )
    text = generation.collect()[0].text
    model.train(was_training)
    return prompt + text


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Set up ``module`` to be compiled on its first calls.

    Raises:
        UnavailableError: torch.compile fails on a trivial function, for example because a C++
            compiler or Triton is missing.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    # Inductor, Triton and the compilers they start fail in many ways.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnavailableError(
            f"--compile does not work here ({reason[0]:.200}); it needs a C++ compiler such as "
            "g++, and Triton on CUDA: install them, or drop --compile"
        ) from error
    module.compile()


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1
