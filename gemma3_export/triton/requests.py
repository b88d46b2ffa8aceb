"""Read the input tensors of a Triton request.

Sampling parameters are the fields of the server's OpenAI API, and are checked by the same code.
As with Triton's vLLM backend, their values may be texts ("0.5"), and in their place a request may
have parameters of its own, which is how the generate endpoint passes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.limits import shown
from gemma3_export.serve.errors import ApiError
from gemma3_export.serve.requests import (
    Asked,
    ChatRequest,
    CompletionRequest,
    check_chat,
    check_completion,
    convert,
    decode_json,
)
from gemma3_export.serve.settings import ServeOptions
from gemma3_export.triton.model_config import RETURN_FLAGS

__all__ = ["TritonRequest", "read_request"]

PROMPTS = ("text_input", "input_ids", "messages")
# Fields of the API that are tensors here, or that Triton has no place for.
NOT_SAMPLING = ("model", "prompt", "messages", "stream", "stream_options", "echo")
TRITONS_OWN = "triton_"  # parameters that the server itself adds or reads

GetTensor = Callable[[str], NDArray[Any] | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonRequest:
    """A request whose tensors have been checked.

    Args:
        asked: what to generate.
        returned: the outputs that were asked for besides the text.
        prefix: the text that the answer begins with: the prompt, or nothing.
    """

    asked: Asked
    returned: frozenset[str]
    prefix: str


def read_request(
    get_tensor: GetTensor, parameters: Mapping[str, Any], limits: ServeOptions
) -> TritonRequest:
    """Read a request.

    Args:
        get_tensor: returns an input by its name, None if the request lacks it. Strings are bytes.
        parameters: of the request.
        limits: of what it may ask for.

    Raises:
        ApiError: an input is missing, invalid or not supported.
        InputError: the same, for sampling parameters.
    """
    given = [name for name in PROMPTS if get_tensor(name) is not None]
    if len(given) != 1:
        raise ApiError(
            400,
            f"the request has {' and '.join(given) or 'no prompt'}; give one of "
            f"{', '.join(PROMPTS)}",
        )
    flags = {name: _flag(get_tensor, name) for name in ("stream", *RETURN_FLAGS)}
    returned = frozenset(name.removeprefix("return_") for name in RETURN_FLAGS if flags[name])
    text = _text(get_tensor, "sampling_parameters")
    if text is None:
        sampling = {
            name: value for name, value in parameters.items() if not name.startswith(TRITONS_OWN)
        }
    else:
        sampling = _object(text, "sampling_parameters")
    for name in NOT_SAMPLING:
        if name in sampling:
            raise ApiError(
                400, f"{name} is not a sampling parameter; the inputs are tensors", param=name
            )
    needs_logprobs = bool({"logprobs", "cumulative_logprob"} & returned)
    streams = bool(flags["stream"])
    prefix = ""
    if given[0] == "messages":
        messages = decode_json(_text(get_tensor, "messages") or b"", "messages")
        data = {**sampling, "messages": messages, "stream": streams}
        if needs_logprobs:
            data["logprobs"] = True
        asked = check_chat(convert(data, ChatRequest, strict=False), limits)
    else:
        prompt: Any
        if given[0] == "text_input":
            prompt = prefix = _utf8(_text(get_tensor, "text_input") or b"", "text_input")
        else:
            prompt = _ids(get_tensor("input_ids"))
        data = {**sampling, "prompt": prompt, "stream": streams}
        if needs_logprobs:
            data.setdefault("logprobs", 0)
        asked = check_completion(convert(data, CompletionRequest, strict=False), limits)
        if asked.max_tokens == 0:  # which the API has for echo
            raise ApiError(400, "max_tokens is 0; it must be at least 1", param="max_tokens")
    if _excludes_input(get_tensor, given[0], streams):
        prefix = ""
    return TritonRequest(asked=replace(asked, streams=streams), returned=returned, prefix=prefix)


def _excludes_input(get_tensor: GetTensor, prompt: str, streams: bool) -> bool:
    """Return whether the answer leaves out the prompt, which only a text can be part of."""
    excludes = _flag(get_tensor, "exclude_input_in_output")
    is_possible = prompt == "text_input" and not streams
    if excludes is None:
        return not is_possible
    if not excludes and not is_possible:
        raise ApiError(
            400,
            "exclude_input_in_output is false, which needs text_input without stream; leave it "
            "out, or set it to true",
        )
    return excludes


def _one(get_tensor: GetTensor, name: str) -> Any:
    """Return the only element of an input; None if the request lacks it."""
    tensor = get_tensor(name)
    if tensor is None:
        return None
    if tensor.size != 1:
        raise ApiError(400, f"{name} has {tensor.size} elements; it must have one", param=name)
    return tensor.ravel()[0]


def _flag(get_tensor: GetTensor, name: str) -> bool | None:
    found = _one(get_tensor, name)
    return None if found is None else bool(found)


def _text(get_tensor: GetTensor, name: str) -> bytes | None:
    found = _one(get_tensor, name)
    return found.encode() if isinstance(found, str) else found


def _utf8(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{name} is not UTF-8: {error!s:.200}", param=name) from error


def _object(text: bytes, name: str) -> dict[str, Any]:
    found = decode_json(text, name)
    if not isinstance(found, dict):
        raise ApiError(400, f"{name} is {shown(found)}; it must be a JSON object", param=name)
    return found


def _ids(tensor: NDArray[Any] | None) -> list[int]:
    assert tensor is not None
    return [int(token) for token in np.ravel(tensor)]
