"""The interface and the settings of a model in Triton: what ``config.pbtxt`` says.

Inputs and outputs have the names of Triton's vLLM backend where it has them, so that its clients
work. Settings are ``parameters`` of the config, where an operator can change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gemma3_export.api.checks import check_integers, check_texts
from gemma3_export.api.options import PREFIX_CACHE_BYTES
from gemma3_export.device import parse_device
from gemma3_export.errors import InputError
from gemma3_export.limits import MAX_SIZE_BYTES, QUEUE_LIMIT, SLOTS, check_threads, shown
from gemma3_export.serve.settings import MAX_TOKENS

__all__ = ["INPUTS", "OUTPUTS", "RETURN_FLAGS", "TritonOptions", "config_text", "read_parameters"]

Tensor = tuple[str, str, int]  # name, data type, size of its one axis (-1: any)

RETURN_FLAGS = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_token_ids",
)
# All are optional. A request has one of the first three.
INPUTS: tuple[Tensor, ...] = (
    ("text_input", "TYPE_STRING", 1),
    ("input_ids", "TYPE_INT64", -1),
    ("messages", "TYPE_STRING", 1),  # JSON
    ("sampling_parameters", "TYPE_STRING", 1),  # JSON
    ("stream", "TYPE_BOOL", 1),
    ("exclude_input_in_output", "TYPE_BOOL", 1),
    *((name, "TYPE_BOOL", 1) for name in RETURN_FLAGS),
)
# Those after the first are sent if the flag "return_..." asks for them.
OUTPUTS: tuple[Tensor, ...] = (
    ("text_output", "TYPE_STRING", 1),
    ("finish_reason", "TYPE_STRING", 1),
    ("cumulative_logprob", "TYPE_FP32", 1),
    ("logprobs", "TYPE_STRING", 1),  # JSON
    ("num_input_tokens", "TYPE_UINT32", 1),
    ("num_output_tokens", "TYPE_UINT32", 1),
    ("token_ids", "TYPE_INT64", -1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonOptions:
    """Settings of a model instance.

    Args:
        variant: which of the bundle's graphs to run; None is its default.
        threads: intra-op threads; None is as many as the process may use.
        slots: requests that run at once.
        queue_limit: requests that may wait; more fail as unavailable.
        max_request_tokens: tokens of prompt and answer that one request can hold; None is the
            model's context, at most 8192.
        max_tokens: maximum number of tokens that a request may ask for.
        cache_bytes: limit on keys and values of running requests; None for no limit.
        prefill_chunk: see :class:`gemma3_export.api.engine.EngineOptions`.
        kept_prefix_bytes: memory for prompt prefixes that are kept between requests; 0 is off.

    Raises:
        InputError: a value is out of range.
    """

    variant: str | None = None
    threads: int | None = None
    slots: int = SLOTS
    queue_limit: int = QUEUE_LIMIT
    max_request_tokens: int | None = None
    max_tokens: int = MAX_TOKENS
    cache_bytes: int | None = None
    prefill_chunk: int | None = None
    kept_prefix_bytes: int = PREFIX_CACHE_BYTES

    def __post_init__(self) -> None:
        check_texts(self, "variant")
        check_threads(self.threads)
        check_integers(self, 1, "slots", "max_request_tokens", "max_tokens", "prefill_chunk")
        check_integers(self, 0, "queue_limit")
        check_integers(self, 1, "cache_bytes", most=MAX_SIZE_BYTES)
        check_integers(self, 0, "kept_prefix_bytes", most=MAX_SIZE_BYTES)


def config_text(name: str, device: str, options: TritonOptions) -> str:
    """Return the text of ``config.pbtxt``.

    Args:
        name: of the model; letters, digits, dots, dashes and underscores.
        device: ``cpu``; ``cuda`` for one instance on each GPU; or ``cuda:N``.
        options: become parameters; those that are None are left out.

    Raises:
        InputError: the device is unknown, or ``auto``, which Triton does not have.
    """
    given = {each.name: getattr(options, each.name) for each in fields(options)}
    parameters = {key: str(value) for key, value in given.items() if value is not None}
    # Otherwise Triton may hand the token ids over in the GPU's memory.
    parameters["FORCE_CPU_ONLY_INPUT_TENSORS"] = "yes"
    blocks = [
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0  # the engine batches',
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: 1 {_placement(device)} }} ]",
        *(_tensor("input", each, " optional: true") for each in INPUTS),
        *(_tensor("output", each) for each in OUTPUTS),
        *(
            f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(blocks) + "\n"


def read_parameters(parameters: Mapping[str, Any]) -> TritonOptions:
    """Return the options in the parameters of a config, as Triton passes it to a model.

    Names in capitals are Triton's own.

    Raises:
        InputError: a parameter is unknown, or its value is wrong.
    """
    known = {each.name for each in fields(TritonOptions)}
    found: dict[str, Any] = {}
    for key, value in parameters.items():
        text = value["string_value"]
        if key.isupper():
            continue
        if key not in known:
            raise InputError(
                f"config.pbtxt has the parameter {shown(key)}, which does not exist; choose among "
                f"{', '.join(sorted(known))}"
            )
        if key == "variant":
            found[key] = text
            continue
        try:
            found[key] = int(text)
        except ValueError as error:
            raise InputError(
                f"config.pbtxt: the parameter {key} is {shown(text)}; it must be a whole number"
            ) from error
    return TritonOptions(**found)


def _placement(device: str) -> str:
    wanted = parse_device(device)
    if wanted is None:
        raise InputError("Triton needs a fixed device; give cpu, cuda or cuda:N instead of auto")
    if wanted.kind == "cpu":
        return "kind: KIND_CPU"
    return "kind: KIND_GPU" + ("" if device == "cuda" else f" gpus: [ {wanted.index} ]")


def _tensor(role: str, tensor: Tensor, more: str = "") -> str:
    name, kind, size = tensor
    return f'{role} {{ name: "{name}" data_type: {kind} dims: [ {size} ]{more} }}'
