"""Run many requests at once on one model, from threads or asyncio.

    import gemma3_export

    with gemma3_export.Engine("gemma-3-270m") as engine:
        for piece in engine.stream("The sea is", max_new_tokens=64):
            print(piece, end="")

One thread drives the generation loop. Callers check and encode their prompts in their own threads
and leave requests in an inbox; the loop takes them between two steps.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from gemma3_export.api.checks import check_integers
from gemma3_export.api.engine_stream import EngineStream, EventChannel
from gemma3_export.api.model import Model
from gemma3_export.api.model_files import Weights
from gemma3_export.api.opening import warm_up_prompt
from gemma3_export.api.options import GenerateOptions, LoadOptions, merged
from gemma3_export.api.prompts import Prompt, is_one_prompt
from gemma3_export.bundle import Bundle
from gemma3_export.errors import EngineClosedError, InputError, QueueFullError
from gemma3_export.limits import (
    CPU_PREFILL_CHUNK,
    MAX_SIZE_BYTES,
    PREFILL_CHUNK,
    QUEUE_LIMIT,
    SLOTS,
)
from gemma3_export.runtimes.generation.loop import GenerationLoop, StepEvent
from gemma3_export.runtimes.generation.prefix_cache import require_transferable
from gemma3_export.runtimes.generation.prepare import GenerationOptions, prepare_request
from gemma3_export.runtimes.generation.request import Completion, Failure, TokenEvent
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.scheduler import (
    ScheduledRequest,
    in_turns,
    require_fits,
)
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["Engine", "EngineOptions", "EngineStats"]

logger = logging.getLogger(__name__)

DEFAULT_REQUEST_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions(LoadOptions):
    """Options of an :class:`Engine`: those of :func:`gemma3_export.load`, and its limits.

    Args:
        slots: requests that run at once.
        max_request_tokens: tokens of prompt and answer that one request can hold; None is the
            model's context, at most 8192.
        cache_bytes: maximum memory for keys and values. A request waits until what it may need is
            free; None waits for a slot only.
        queue_limit: requests that may wait.
        prefill_chunk: prompt tokens per step while other requests are generating, unless the
            request sets its own. Fewer make answers smoother, and more finish prompts sooner. None
            is 32 on the CPU, 512 on a GPU. While none is generating, a step has up to 512, in whole
            chunks.

    Raises:
        InputError: a value is out of range.
    """

    slots: int = SLOTS
    max_request_tokens: int | None = None
    cache_bytes: int | None = None
    queue_limit: int = QUEUE_LIMIT
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        LoadOptions.__post_init__(self)
        check_integers(self, 1, "slots", "max_request_tokens", "prefill_chunk")
        check_integers(self, 1, "cache_bytes", most=MAX_SIZE_BYTES)
        check_integers(self, 0, "queue_limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of an engine; totals count since it was opened.

    Attributes:
        slots: requests that can run at once.
        running: requests that have a slot.
        waiting: requests that wait for one.
        cached_tokens: tokens of running requests in the cache.
        reserved_tokens: tokens that they may need at most.
        max_tokens: maximum number that can be reserved.
        prompt_tokens: total of finished requests.
        reused_tokens: of these, copied from earlier prompts.
        new_tokens: total of generated tokens.
        finished: number of finished requests by finish reason, or ``error``.
    """

    slots: int
    running: int
    waiting: int
    cached_tokens: int
    reserved_tokens: int
    max_tokens: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    finished: Mapping[str, int]


class Engine:
    """A model that runs many requests at once; safe to share between threads and event loops.

    Attributes:
        model: the model, with its tokenizer and config.

    Args:
        source: the path of a bundle or of weights, as for :func:`gemma3_export.load`, an opened
            bundle, or a :class:`Model`, which then decides how it is loaded.
        options: how to load the model, and the engine's limits.
        changes: fields of :class:`EngineOptions`.

    Raises:
        InputError: as :func:`gemma3_export.load`; or the limits leave no room for a request.
        UnavailableError: a package or the device is missing.
    """

    def __init__(
        self,
        source: Path | str | Bundle | Weights | Model,
        options: EngineOptions | None = None,
        **changes: Any,
    ) -> None:
        self.options = merged(EngineOptions, options, changes)
        loading = {field.name: getattr(self.options, field.name) for field in fields(LoadOptions)}
        if isinstance(source, Model):
            if LoadOptions(**loading) != LoadOptions():
                raise InputError(
                    "the model is already loaded; pass load options to gemma3_export.load, "
                    "or a path to the engine"
                )
            self.model = source
            self._owns_model = False
        else:
            self.model = Model(source, **loading)
            self._owns_model = True
        self._worker = _Worker(self.model, self.options)
        weakref.finalize(self, self._worker.abandon).atexit = False

    def stream(
        self, prompt: Prompt, options: GenerateOptions | None = None, **changes: Any
    ) -> EngineStream:
        """Submit a prompt, and return its stream at once.

        Args:
            prompt: a text, token ids, or the messages of a conversation.
            options: how to sample, when to stop, and so on.
            changes: fields of :class:`GenerateOptions`.

        Raises:
            InputError: the prompt or an option is invalid, or the request can never fit.
            QueueFullError: too many requests are waiting.
            EngineClosedError: the engine is closing or closed.
        """
        options = merged(GenerateOptions, options, changes)
        if not is_one_prompt(prompt):
            raise InputError("an engine takes one prompt per request; submit them one by one")
        channel, request = self._worker.submit(prompt, options)
        return EngineStream(channel, request.state, partial(self._worker.cancel, request), self)

    @property
    def is_open(self) -> bool:
        """Whether the engine accepts requests, if its queue has room."""
        return self._worker.is_open

    @property
    def max_request_tokens(self) -> int:
        """Maximum number of tokens of one request, prompt and answer."""
        return self._worker.max_request_tokens

    async def generate(
        self, prompt: Prompt, options: GenerateOptions | None = None, **changes: Any
    ) -> Completion:
        """Submit a prompt, and return its completion; arguments and errors as :meth:`stream`.

        Raises:
            Gemma3ExportError: the request failed.
        """
        return await self.stream(prompt, options, **changes)

    def stats(self) -> EngineStats:
        """Return how busy the engine is."""
        return self._worker.stats()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Reject new requests, finish the others, and release the memory.

        A model that was given to the engine stays open.

        Args:
            drain: finish the requests that run and wait; otherwise cancel them.
            timeout: seconds after which those that have not finished are cancelled; None waits.
        """
        self._worker.close(drain, timeout)
        if self._owns_model:
            self.model.close()

    async def aclose(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Do the same as :meth:`close` without blocking the event loop."""
        await asyncio.to_thread(self.close, drain=drain, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain=exc is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose(drain=exc is None)


@dataclass(frozen=True, slots=True)
class _Close:
    """Tells the thread to end once it has no request."""


@dataclass(frozen=True, slots=True)
class _CancelAll:
    """Tells the thread to end every request."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    """Tells the thread to end one request, unless it has ended."""

    request: ScheduledRequest


@dataclass(frozen=True, slots=True)
class _Submit:
    """Brings the thread a request."""

    request: ScheduledRequest


class _Worker:
    """The thread that drives the loop, and the inbox that other threads fill.

    It knows nothing of the engine, which can therefore be garbage-collected while the thread runs.
    Destructors may cancel and close, at any point of any thread, so both only write to the inbox,
    whose ``put`` is reentrant, and take no lock.
    """

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self._model, self._options = model, options
        self._runtime = model.open()
        context = self._runtime.config.max_position_embeddings
        self._capacity = options.max_request_tokens or min(context, DEFAULT_REQUEST_TOKENS)
        self._prefill_chunk = options.prefill_chunk or default_prefill_chunk(self._runtime)
        self._loop = self._new_loop()
        self._max_tokens = self._loop.scheduler.max_tokens
        if options.warm_up:
            self._warm_up()
        self._numbers = itertools.count()
        self._inbox: SimpleQueue[_Submit | _Cancel | _CancelAll | _Close] = SimpleQueue()
        self._lock = threading.Lock()  # guards everything below
        self._requests: dict[int, tuple[EventChannel, ScheduledRequest]] = {}  # not ended
        self._is_closing = False
        self._error: BaseException | None = None  # that ended the thread
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._usage = self._measured()
        self._process = os.getpid()  # a fork has no such thread, and may find the lock held
        # A daemon, because an engine that nobody closed must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="gemma3-engine", daemon=True)
        self._thread.start()
        _running.add(self)

    # --- called by other threads ----------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """See :attr:`Engine.is_open`."""
        return self._error is None and not self._is_closing

    @property
    def max_request_tokens(self) -> int:
        """See :attr:`Engine.max_request_tokens`."""
        return min(self._capacity, self._max_tokens)

    def submit(
        self, prompt: Prompt, options: GenerateOptions
    ) -> tuple[EventChannel, ScheduledRequest]:
        """Check a request and put it into the inbox."""
        if self._is_forked:
            raise EngineClosedError(
                "the engine was opened before this process was forked, and its thread runs only in "
                "the parent; open an engine in each process"
            )
        with self._lock:  # before the prompt is encoded, which takes time
            self._require_room()
            index, runtime = next(self._numbers), self._runtime
        request = self._model.prepare(
            prompt,
            options,
            runtime,
            index=index,
            capacity=self._capacity,
            prefill_chunk=self._prefill_chunk,
        )
        require_fits(request, self.max_request_tokens)
        channel = EventChannel()
        with self._lock:
            self._require_room()
            self._requests[index] = channel, request
            self._inbox.put(_Submit(request))
        return channel, request

    def cancel(self, request: ScheduledRequest) -> None:
        """End a request, unless it has ended."""
        self._inbox.put(_Cancel(request))

    def abandon(self) -> None:
        """End the thread after its current step."""
        self._is_closing = True
        self._inbox.put(_CancelAll())
        self._inbox.put(_Close())

    def close(self, drain: bool, timeout: float | None) -> None:
        """End the thread and wait for it; see :meth:`Engine.close`."""
        if self._is_forked:
            return
        with self._lock:
            self._is_closing = True
        self._inbox.put(_Close())
        if drain:
            self._thread.join(timeout)
        self._inbox.put(_CancelAll())
        self._thread.join()

    def stats(self) -> EngineStats:
        """Return a snapshot, taken after the last step."""
        with self._lock:
            usage, totals = self._usage, self._totals
            return EngineStats(
                slots=self._options.slots,
                waiting=max(0, len(self._requests) - usage["running"]),
                max_tokens=self._max_tokens,
                prompt_tokens=totals["prompt_tokens"],
                reused_tokens=totals["reused_tokens"],
                new_tokens=totals["new_tokens"],
                finished=dict(self._finished),
                **usage,
            )

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def _require_room(self) -> None:
        if self._error is not None:
            raise EngineClosedError(
                f"the engine has stopped after an error ({self._error}); open another one"
            )
        if self._is_closing:
            raise EngineClosedError("the engine is closed; open another one")
        if len(self._requests) >= self._options.slots + self._options.queue_limit:
            raise QueueFullError(
                f"{len(self._requests)} requests are running or waiting, and the queue is full; "
                "try again later, or raise queue_limit"
            )

    # --- called by the thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._receive():
                self._deliver(self._step())
                with self._lock:
                    self._usage = self._measured()
        except BaseException as error:
            logger.exception("the engine has stopped")
            self._stop(error)
        finally:
            _running.discard(self)
            for name in ("_loop", "_runtime"):  # with cache and weights
                vars(self).pop(name, None)

    def _receive(self) -> bool:
        """Take what is in the inbox, or wait for it if there is nothing to compute.

        Returns:
            False if the engine is closing and every request has ended.
        """
        while self._loop.is_idle and not self._is_drained():
            self._handle(self._inbox.get())
        while not self._inbox.empty():
            self._handle(self._inbox.get())
        return not self._loop.is_idle or not self._is_drained()

    def _is_drained(self) -> bool:
        with self._lock:
            return self._is_closing and not self._requests

    def _handle(self, message: _Submit | _Cancel | _CancelAll | _Close) -> None:
        if isinstance(message, _Submit):
            self._loop.submit(message.request)
        elif isinstance(message, _Cancel):
            self._cancel([message.request])
        elif isinstance(message, _CancelAll):
            with self._lock:
                requests = [request for _, request in self._requests.values()]
            self._cancel(requests)

    def _cancel(self, requests: Sequence[ScheduledRequest]) -> None:
        for request in requests:
            if request.state.index in self._requests:
                self._deliver([self._loop.cancel(request)])

    def _step(self) -> list[StepEvent]:
        """Run a step of the loop; if the runtime fails, end all requests that have a slot."""
        try:
            return self._loop.step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            running, waiting = self._loop.scheduler.running, self._loop.scheduler.waiting
            del self._loop  # the cache is in an unknown state; release its memory first
            self._loop = self._new_loop()
            self._loop.scheduler.waiting = waiting
            return [Failure(request=request.state.index, error=error) for request in running]

    def _deliver(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            with self._lock:
                channel, request = self._requests[event.request]
                if isinstance(event, TokenEvent):
                    self._totals["new_tokens"] += 1
                else:
                    del self._requests[event.request]
                    reason = "error" if isinstance(event, Failure) else event.finish_reason
                    self._finished[reason] += 1
                    self._totals["prompt_tokens"] += request.prefilled_tokens
                    self._totals["reused_tokens"] += request.state.reused_tokens
            channel.put(event)

    def _stop(self, error: BaseException) -> None:
        """End every request with ``error``."""
        with self._lock:
            self._error = error
            requests, self._requests = self._requests, {}
        for index, (channel, _) in requests.items():
            failed = EngineClosedError(f"the engine has stopped after an error: {error}")
            channel.put(Failure(request=index, error=failed))

    def _measured(self) -> dict[str, int]:
        scheduler = self._loop.scheduler
        running = scheduler.running
        return {
            "running": len(running),
            "cached_tokens": sum(int(self._loop.cache.lengths[each.row]) for each in running),
            "reserved_tokens": scheduler.reserved_tokens,
        }

    def _new_loop(self) -> GenerationLoop:
        options = self._options
        cache = self._runtime.new_cache(options.slots, self._capacity)
        max_tokens = None
        if options.cache_bytes is not None:
            max_tokens = require_transferable(cache).tokens_within(options.cache_bytes)
            if max_tokens < 1:
                raise InputError(
                    f"cache_bytes is {options.cache_bytes}, too little for the caches of "
                    f"{options.slots} slots; raise it, or lower slots"
                )
        return GenerationLoop(
            self._runtime,
            cache,
            plan_next=in_turns,
            max_tokens=max_tokens,
            prefix_cache=self._model.kept_prefixes(self._runtime),
        )

    def _warm_up(self) -> None:
        """Fill every slot once, so that the first requests find kernels and memory ready."""
        prompt, new_tokens = warm_up_prompt(self._runtime.config)
        limits = GenerationOptions(max_new_tokens=new_tokens, stop_token_ids=())
        prompt = prompt[: self._capacity]
        for index in range(self._options.slots):
            request = prepare_request(
                self._runtime, index, prompt, SamplingParams(), limits, self._capacity
            )
            self._loop.submit(request)
        while not self._loop.is_idle:
            self._loop.step()


def default_prefill_chunk(runtime: Runtime) -> int:
    """Return how many prompt tokens an engine computes per step beside answers."""
    is_cpu = runtime.info.device.kind == "cpu"
    return CPU_PREFILL_CHUNK if is_cpu else PREFILL_CHUNK


_running: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all threads before the interpreter takes apart what they use."""
    for worker in list(_running):
        worker.close(drain=False, timeout=None)
