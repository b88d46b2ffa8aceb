"""The model that Triton's Python backend runs: an engine whose requests are Triton's.

Triton calls ``execute`` in one thread, which submits requests to the engine and returns. An event
loop in a thread of its own sends the answers as the engine produces them, and asks every
``CANCEL_POLL_S`` seconds whether a client has left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # Triton has it

from gemma3_export.api.completion_json import logprobs_to_json
from gemma3_export.api.engine import Engine
from gemma3_export.errors import Gemma3ExportError, UnavailableError
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SampledToken
from gemma3_export.serve.errors import ApiError, ClientGoneError, to_api_error
from gemma3_export.serve.running import RunningRequest, with_tool_prompt
from gemma3_export.serve.settings import ServeOptions
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.triton.model_config import read_parameters
from gemma3_export.triton.repository import open_recorded_bundle
from gemma3_export.triton.requests import TritonRequest, read_request

__all__ = ["TritonPythonModel"]

CANCEL_POLL_S = 0.1
DRAIN_S = 25.0  # Triton gives up after 30 s (--exit-timeout-secs)
FINAL = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """A model instance; Triton calls its methods, all from one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: what Triton says about the model, its config and the place of this instance.
        """
        try:
            _require_numpy_support()
            self._engine, self._limits = _open(args)
        except Gemma3ExportError as error:
            raise triton.TritonModelException(str(error)) from error
        self._unfinished: set[concurrent.futures.Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="triton-answers")
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit requests to the engine; their answers follow through their response senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                wanted = _read(request, self._limits)
                asked = with_tool_prompt(self._engine, wanted.asked)
                running = RunningRequest(self._engine, asked)
            except Exception as error:
                _send_error(sender, error)
                continue
            answer = _Answer(sender, running, wanted, self._engine.model.tokenizer)
            future = asyncio.run_coroutine_threadsafe(answer.send(), self._loop)
            self._unfinished.add(future)
            future.add_done_callback(self._unfinished.discard)

    def finalize(self) -> None:
        """Finish running requests, cancel those that take too long, and release the memory."""
        self._engine.close(timeout=DRAIN_S)
        concurrent.futures.wait(list(self._unfinished), timeout=DRAIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _require_numpy_support() -> None:
    """Check that this Triton can read and write the arrays of the installed numpy.

    Before 24.12, its Python backend takes arrays of numpy 2 for others, and the process dies at the
    first text.

    Raises:
        UnavailableError: it cannot.
    """
    expected = np.arange(4, dtype=np.int32)
    if np.__version__.startswith("1."):
        return
    found = triton.Tensor.from_dlpack("probe", expected).as_numpy()
    if not np.array_equal(found, expected):
        raise UnavailableError(
            f"this Triton cannot exchange arrays with numpy {np.__version__}; use Triton 24.12 or "
            "newer"
        )


def _open(args: Mapping[str, str]) -> tuple[Engine, ServeOptions]:
    options = read_parameters(json.loads(args["model_config"]).get("parameters", {}))
    version_folder = Path(args["model_repository"]) / args["model_version"]
    is_gpu = args["model_instance_kind"] == "GPU"
    engine = Engine(
        open_recorded_bundle(version_folder, options.variant),
        device=f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu",
        threads=options.threads,
        slots=options.slots,
        queue_limit=options.queue_limit,
        max_request_tokens=options.max_request_tokens,
        cache_bytes=options.cache_bytes,
        prefill_chunk=options.prefill_chunk,
        kept_prefix_bytes=options.kept_prefix_bytes,
        warm_up=True,
    )
    limits = ServeOptions(
        model_name=args["model_name"], max_tokens=options.max_tokens, max_choices=1
    )
    return engine, limits


def _read(request: Any, limits: ServeOptions) -> TritonRequest:
    def get_tensor(name: str) -> Any:
        tensor = triton.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    return read_request(get_tensor, json.loads(request.parameters() or "{}"), limits)


@dataclass(kw_only=True, slots=True)
class _Piece:
    """What one response carries."""

    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)


class _Answer:
    """Sends the answer to one request.

    Args:
        sender: Triton's response sender.
        running: the request in the engine, with one choice.
        wanted: which outputs to send, and whether to stream.
        tokenizer: of the model; None if it has none.
    """

    def __init__(
        self,
        sender: Any,
        running: RunningRequest,
        wanted: TritonRequest,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._sender, self._running, self._wanted = sender, running, wanted
        self._tokenizer = tokenizer
        self._logprob = 0.0  # of all tokens so far

    async def send(self) -> None:
        """Send everything; an error becomes the last response."""
        watcher = asyncio.create_task(self._watch())
        try:
            await self._send_answer()
        except Exception as error:
            _send_error(self._sender, error)
        finally:
            watcher.cancel()
            self._running.cancel()

    async def _send_answer(self) -> None:
        streams = self._wanted.asked.streams
        piece = _Piece(text=self._wanted.prefix)
        async for _, event in self._running.events():
            if isinstance(event, Completion):
                self._sender.send(self._response(piece, event.finish_reason), flags=FINAL)
                continue
            piece.text += event.text
            piece.tokens.append(event.token)
            if streams and event.text:
                self._sender.send(self._response(piece))
                piece = _Piece()
                await asyncio.sleep(0)  # with many tokens ready, others must have their turn

    async def _watch(self) -> None:
        """End the request when its client has left."""
        while not self._sender.is_cancelled():
            await asyncio.sleep(CANCEL_POLL_S)
        self._running.give_up()

    def _response(self, piece: _Piece, finish_reason: str = "") -> Any:
        """Return a response with the outputs that were asked for."""
        returned = self._wanted.returned
        outputs = [_string("text_output", piece.text)]
        if "finish_reason" in returned:
            outputs.append(_string("finish_reason", finish_reason))
        if "cumulative_logprob" in returned:
            self._logprob += sum(token.logprob or 0.0 for token in piece.tokens)
            outputs.append(_tensor("cumulative_logprob", [self._logprob], np.float32))
        if "logprobs" in returned:
            found = [logprobs_to_json(token, self._tokenizer) for token in piece.tokens]
            outputs.append(_string("logprobs", json.dumps(found)))
        if "num_input_tokens" in returned:
            count = self._running.prompt_tokens
            outputs.append(_tensor("num_input_tokens", [count], np.uint32))
        if "num_output_tokens" in returned:
            outputs.append(_tensor("num_output_tokens", [len(piece.tokens)], np.uint32))
        if "token_ids" in returned:
            ids = [token.token_id for token in piece.tokens]
            outputs.append(_tensor("token_ids", ids, np.int64))
        return triton.InferenceResponse(output_tensors=outputs)


def _tensor(name: str, values: Sequence[float], dtype: type[np.generic]) -> Any:
    return triton.Tensor(name, np.array(values, dtype))


def _string(name: str, text: str) -> Any:
    return triton.Tensor(name, np.array([text.encode()], np.object_))


def _send_error(sender: Any, error: Exception) -> None:
    """Send an error as the last response."""
    if isinstance(error, ClientGoneError):
        message, code = "the client has cancelled the request", triton.TritonError.CANCELLED
    else:
        found = to_api_error(error)
        message, code = found.message, _code(found)
    response = triton.InferenceResponse(output_tensors=[], error=triton.TritonError(message, code))
    try:
        sender.send(response, flags=FINAL)
    except Exception as failure:  # Triton has closed the request
        triton.Logger.log_error(f"could not send an error ({message}): {failure}")


def _code(error: ApiError) -> Any:
    """Return Triton's code for an HTTP status."""
    if error.status in (429, 503):
        return triton.TritonError.UNAVAILABLE
    if error.status == 501:
        return triton.TritonError.UNSUPPORTED
    return triton.TritonError.INVALID_ARG if error.status < 500 else triton.TritonError.INTERNAL
