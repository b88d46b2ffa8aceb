"""Run a model repository on a real Triton server: `make test-triton`.

The server, its Python backend and its clients come from PyPI (nvidia-pytriton, tritonclient). HTTP
and gRPC clients ask for what a Model generates, leave early and fill the queue; at the end, the
server is told to stop while it answers. The server is older than 24.12, so numpy is 1.26 there.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import gemma3_export
from benchmarks.environments import free_port
from gemma3_export import Model
from gemma3_export.bundle import Bundle
from gemma3_export.triton.model_config import TritonOptions
from gemma3_export.triton.repository import write_repository

NAME = "demo"
PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "max_tokens": 24}
START_S = 120.0


def main() -> None:
    """Run the server on a bundle and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    model = gemma3_export.load(bundle, device="cpu", threads=1)
    expected = model.generate(PROMPT, max_new_tokens=24).text
    with tempfile.TemporaryDirectory() as folder:
        options = TritonOptions(threads=1, slots=2, queue_limit=2)
        write_repository(Bundle(bundle), Path(folder) / "models", NAME, options)
        server, ports = start(Path(folder))
        try:
            wait_until_ready(server, ports["http"])
            check_http(ports["http"], expected)
            asyncio.run(check_grpc(ports["grpc"], model, expected))
            asyncio.run(check_drain(server, ports["grpc"], expected))
        finally:
            server.terminate()
            server.wait(60)
    print("Triton generates what the model does")


def start(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
    """Start the server of the nvidia-pytriton package, with its log on stderr."""
    packages = Path(sysconfig.get_paths()["purelib"])
    parts = packages / "pytriton/tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "backends/python"
    shutil.copytree(parts / "backends/python", python)
    shutil.copy(parts / f"python_backend_stubs/{version}/triton_python_backend_stub", python)
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [str(parts / "bin/tritonserver"), f"--model-repository={folder / 'models'}"]
    command += [f"--backend-directory={folder / 'backends'}", "--log-info=false"]
    for name, port in ports.items():
        command += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",  # the backend runs this Python
    }
    return subprocess.Popen(command, env=environment), ports


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Poll the server until it is ready."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, "the server has ended"
        try:
            if request(port, "GET", "/v2/health/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the server is not ready after {START_S} s")


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, str]:
    """Send an HTTP request, and return status and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def check_http(port: int, expected: str) -> None:
    """Check the generate endpoints, as clients of the vLLM backend use them."""
    path = f"/v2/models/{NAME}"
    asked = {"text_input": PROMPT, "parameters": GREEDY}
    status, text = request(port, "POST", f"{path}/generate", asked)
    assert (status, json.loads(text)["text_output"]) == (200, PROMPT + expected), text
    sampling = {"sampling_parameters": json.dumps(GREEDY), "return_finish_reason": True}
    asked = {"text_input": PROMPT, "stream": True, **sampling}
    status, text = request(port, "POST", f"{path}/generate_stream", asked)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert "".join(event["text_output"] for event in events) == expected, text
    assert len(events) > 5
    assert events[-1]["finish_reason"] == "length"
    status, text = request(port, "POST", f"{path}/generate", {"text_input": PROMPT, "top_p": 7})
    assert status == 400, (status, text)
    assert "top_p is 7" in text


async def check_grpc(port: int, model: Model, expected: str) -> None:
    """Check streams over gRPC: several at once, a seed, an error, a client that leaves."""
    import tritonclient.grpc.aio as grpc

    async with grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        found = await asyncio.gather(*(collect(client, text_input=PROMPT) for _ in range(3)))
        assert [text for text, _ in found] == [expected] * 3
        ids = [int(token) for token in model.encode(PROMPT)]
        sampled = {"temperature": 0.8, "seed": 11, "max_tokens": 24}
        text, outputs = await collect(
            client, sampling=sampled, input_ids=ids, return_token_ids=True, return_logprobs=True
        )
        same = model.generate(PROMPT, max_new_tokens=24, temperature=0.8, seed=11, logprobs=0)
        assert text == same.text
        tokens = [int(token) for each in outputs for token in each.as_numpy("token_ids")]
        assert tokens == list(same.token_ids)
        (wrong,) = await asyncio.gather(collect(client, input_ids=[10**9]), return_exceptions=True)
        assert "1000000000" in str(wrong)
        await leave_early(client)
        full = [collect(client, text_input=PROMPT, sampling=GREEDY) for _ in range(12)]
        results = await asyncio.gather(*full, return_exceptions=True)
        errors = [str(each) for each in results if isinstance(each, Exception)]
        assert errors, "the queue holds 2"
        assert all("too many requests" in each for each in errors), errors
        assert [each[0] for each in results if isinstance(each, tuple)] == [expected] * (
            12 - len(errors)
        )


async def leave_early(client: Any) -> None:
    """Cancel streams after their first piece; their slots must be free for the next requests."""
    for _ in range(3):
        stream = open_stream(client, sampling={"max_tokens": 4000, "temperature": 0})
        await anext(stream)
        stream.cancel()
    end = time.monotonic() + 20
    while True:
        text, _ = await collect(client, text_input=PROMPT, sampling={"max_tokens": 2})
        if text:
            return
        assert time.monotonic() < end


async def check_drain(server: subprocess.Popen[bytes], port: int, expected: str) -> None:
    """Check that a server which is told to stop finishes what runs."""
    import tritonclient.grpc.aio as grpc

    async with grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        stream = open_stream(client, text_input=PROMPT, sampling=GREEDY)
        first, _ = await anext(stream)
        server.terminate()
        text = text_of(first)
        async for result, error in stream:
            assert error is None, error
            text += text_of(result)
        assert text == expected, text
    assert await asyncio.to_thread(server.wait, 60) == 0


def open_stream(client: Any, *, sampling: dict[str, Any] = GREEDY, **inputs: Any) -> Any:
    """Send a streaming request, and return an iterator over (result, error)."""
    if not inputs:
        inputs = {"text_input": PROMPT}
    tensors = inputs | {"stream": True, "sampling_parameters": json.dumps(sampling)}

    async def requests() -> Any:
        yield {"model_name": NAME, "inputs": [tensor(*each) for each in tensors.items()]}

    return client.stream_infer(requests())


async def collect(client: Any, **asked: Any) -> tuple[str, list[Any]]:
    """Return the text of a stream, and its results."""
    found = []
    async for result, error in open_stream(client, **asked):
        if error is not None:
            raise error
        found.append(result)
    return "".join(text_of(each) for each in found), found


def text_of(result: Any) -> str:
    (text,) = result.as_numpy("text_output")
    return bytes(text).decode()


def tensor(name: str, value: Any) -> Any:
    """Return an input tensor."""
    import tritonclient.grpc as grpc

    if isinstance(value, bool):
        array, kind = np.array([value]), "BOOL"
    elif isinstance(value, str):
        array, kind = np.array([value.encode()], np.object_), "BYTES"
    else:
        array, kind = np.array(value, np.int64), "INT64"
    found = grpc.InferInput(name, list(array.shape), kind)
    found.set_data_from_numpy(array)
    return found


if __name__ == "__main__":
    main()
