"""Stands in for Triton's server: what its Python backend offers to a model, as documented.

Importing this module makes ``triton_python_backend_utils`` importable, which exists only in the
process of the real backend. ``make test-triton`` runs the real one.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, json_format, message_factory, text_format
from numpy.typing import NDArray

FINAL = 1
TIMEOUT_S = 60.0  # a safety net
NUMPY_WORKS = True  # a test changes it to what Triton 24.11 does with numpy 2
CODES = ("UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED")
DTYPES = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT64": np.int64}
# The parts of Triton's model_config.proto that we use; the text format knows fields by name.
ENUMS = {"Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")}
ENUMS["DataType"] = ("TYPE_INVALID", *DTYPES, "TYPE_UINT32", "TYPE_FP32")
MESSAGES = {
    "Tensor": "name:string data_type:DataType dims:int64* optional:bool",
    "Policy": "decoupled:bool",
    "Group": "count:int32 kind:Kind gpus:int32*",
    "Value": "string_value:string",
    "Entry": "key:string value:Value",  # a map's, which the text format writes the same way
    "ModelConfig": "name:string backend:string max_batch_size:int32 input:Tensor* output:Tensor* "
    "model_transaction_policy:Policy instance_group:Group* parameters:Entry*",
}


class TritonError:
    """An error of one request."""

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        self.message, self.code = message, code


for _code in (*CODES, "ALREADY_EXISTS", "CANCELLED"):
    setattr(TritonError, _code, _code)


class TritonModelException(Exception):  # noqa: N818  # Triton's name
    """Raised by a model."""


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    @staticmethod
    def from_dlpack(name: str, array: NDArray[Any]) -> Tensor:
        return Tensor(name, array if NUMPY_WORKS else np.zeros_like(array))

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class InferenceResponse:
    """Tensors or an error."""

    def __init__(
        self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None
    ) -> None:
        self.tensors = {each.name(): each.as_numpy() for each in output_tensors or ()}
        self.error = error

    @property
    def text(self) -> str:
        (found,) = self.tensors["text_output"]
        return bytes(found).decode()


class Request:
    """A request and, in ``responses``, what its sender was given."""

    def __init__(self, parameters: dict[str, Any] | None = None, **inputs: Any) -> None:
        self._parameters = parameters or {}
        self.inputs = {name: _array(value) for name, value in inputs.items()}
        self.responses: queue.Queue[tuple[InferenceResponse | None, int]] = queue.Queue()
        self.has_left = self._is_closed = False
        self.was_told = threading.Event()  # the model knows that the client has left

    # --- what the model calls ---

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        if self.has_left:
            self.was_told.set()
        return self.has_left

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self._is_closed:
            raise TritonModelException("a response followed the final one")
        self._is_closed = bool(flags & FINAL)
        self.responses.put((response, flags))

    # --- what tests call ---

    def next(self) -> tuple[InferenceResponse | None, int]:
        return self.responses.get(timeout=TIMEOUT_S)

    def all(self) -> list[InferenceResponse]:
        """Wait for the final response, and return all that carry something."""
        found = []
        while True:
            response, flags = self.next()
            if response is not None:
                found.append(response)
            if flags & FINAL:
                assert self.responses.empty()
                return found


def read_config(path: Path) -> dict[str, Any]:
    """Parse ``config.pbtxt`` as Triton does, and return it as it is passed to a model."""
    config = text_format.Parse(path.read_text(encoding="utf-8"), _model_config())
    found = json_format.MessageToDict(config, preserving_proto_field_name=True)
    found["parameters"] = {each["key"]: each["value"] for each in found["parameters"]}
    return found


def load(folder: Path, **changes: str) -> Any:
    """Load the model in a folder of a repository, and return it."""
    config = read_config(folder / "config.pbtxt")
    assert config["name"] == folder.name
    (group,) = config["instance_group"]
    scope: dict[str, Any] = {}
    exec((folder / "1/model.py").read_text(encoding="utf-8"), scope)
    model = scope["TritonPythonModel"]()
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_instance_kind": group["kind"].removeprefix("KIND_"),
            "model_instance_device_id": "0",
            "model_repository": str(folder),
            "model_version": "1",
            "model_name": folder.name,
        }
        | changes
    )
    return model


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        return np.array([text], np.object_)
    return np.array(value if isinstance(value, list) else [value])


def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, text in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (key, kind) in enumerate((each.split(":") for each in text.split()), 1):
            field = message.field.add(name=key, number=number)
            field.label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in MESSAGES or kind in ENUMS:
                field.type_name = f".{kind}"
                field.type = kinds.TYPE_ENUM if kind in ENUMS else kinds.TYPE_MESSAGE
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    return message_factory.GetMessages([file])["ModelConfig"]()


def _get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def _utilities() -> types.ModuleType:
    found: Any = types.ModuleType("triton_python_backend_utils")
    for each in (TritonError, TritonModelException, Tensor, InferenceResponse):
        setattr(found, each.__name__, each)
    found.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    found.get_input_tensor_by_name = _get_input_tensor_by_name
    found.Logger = types.SimpleNamespace(log_error=lambda text: print(text, file=sys.stderr))
    return found


sys.modules["triton_python_backend_utils"] = _utilities()
