"""TorchScript archives: parity with the reference, and independence of this package."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_export.bundle import Bundle
from gemma3_export.dtypes import FLOAT_DTYPES, torch_dtype
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.torch import torchscript as torchscript_support
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
from tests.support import exported_bundles
from tests.support.generation import generate
from tests.support.observed_runs import SEED, VARIANTS, errors, observe, reference, source_of

PROMPT = [2, 30, 31, 32, 33, 34, 35, 36, 37]  # longer than the window of 6


def export_to(path: Path, variant: str, dtype: str, *, prepack: bool = True) -> Path:
    writer = TorchScriptWriter(dtype=dtype, prepack=prepack)
    return export_bundle(source_of(variant), path, writer).path


def exported(variant: str = "tied", dtype: str = "fp32", prepack: bool = True) -> Path:
    """Return a shared bundle."""
    writer = TorchScriptWriter(dtype=dtype, prepack=prepack)
    return exported_bundles.exported(writer, VARIANTS[variant], SEED)


def archive_of(bundle: Path) -> Path:
    return Bundle(bundle).file(Bundle(bundle).graph("torchscript").path)


class TestComputation:
    @pytest.mark.parametrize("prepack", [True, False], ids=["prepacked", "plain"])
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    @pytest.mark.parametrize("variant", ["tied", "untied"])
    def test_errs_no_more_than_the_reference_in_its_own_dtype(self, variant, dtype, prepack):
        runtime = TorchScriptRuntime(exported(variant, dtype, prepack), device="cpu")
        floor = errors(variant, reference(variant, torch_dtype(dtype)))
        found = errors(variant, runtime)
        assert np.isfinite(found).all()
        # Single roundings may differ, but no error is larger than those of the reference.
        assert max(found) <= 2 * max(floor)
        assert all(error <= 4 * max(floor) for error in found)

    @pytest.mark.parametrize("variant", ["one sliding layer", "one full layer"])
    def test_models_with_one_layer_type(self, variant):
        runtime = TorchScriptRuntime(exported(variant), device="cpu")
        assert max(errors(variant, runtime)) <= 2 * max(
            errors(variant, reference(variant, torch.float32))
        )

    def test_prepacked_and_plain_archives_agree(self):
        prepacked, plain = (
            observe(TorchScriptRuntime(exported(prepack=prepack), device="cpu"))
            for prepack in (True, False)
        )
        for one, other in zip(prepacked, plain, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)

    def test_matrices_are_packed_when_an_archive_is_loaded(self):
        matrix = TorchScriptRuntime(exported(), device="cpu").module.decoder.head.matrix
        assert matrix.is_packed == torch.backends.mkldnn.is_available()
        half = TorchScriptRuntime(exported(dtype="bf16"), device="cpu").module.decoder.head.matrix
        assert not half.is_packed

    def test_describes_itself(self):
        found = TorchScriptRuntime(exported(dtype="bf16"), device="cpu").info.to_json()
        assert found["runtime"] == "torchscript"
        assert found["dtype"] == "bfloat16"
        assert found["target"] == "prepacked"
        assert found["device"] == "cpu"

    def test_the_executor_setting_is_restored(self):
        runtime = TorchScriptRuntime(exported(), device="cpu")
        before = torch._C._get_graph_executor_optimize()
        runtime.step(np.array([PROMPT]), runtime.new_cache(1, 16), num_logits=1)
        assert torch._C._get_graph_executor_optimize() == before

    def test_unknown_dtype_is_rejected(self):
        with pytest.raises(InputError, match=r"int3.*fp32"):
            TorchScriptWriter(dtype="int3")


def load_plainly(bundle: Path, device: str, extra_files: dict[str, str] | None = None) -> Any:
    with torchscript_support.torchscript():
        return torch.jit.load(archive_of(bundle), device, extra_files)


class TestArchive:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_stores_each_weight_once(self, dtype):
        weights = VARIANTS["wide"].num_parameters * torch_dtype(dtype).itemsize
        size = archive_of(exported("wide", dtype)).stat().st_size
        assert weights < size < 1.02 * weights

    def test_carries_its_config(self):
        files = {"config.json": ""}
        load_plainly(exported(), "cpu", files)
        written = json.loads((exported() / "config.json").read_text())
        del written["transformers_version"]  # for transformers, which cannot open an archive
        assert json.loads(files["config.json"]) == written

    def test_carries_no_paths_of_the_machine_that_exported(self):
        checkout = str(Path(__file__).parents[2]).encode()
        with zipfile.ZipFile(archive_of(exported())) as archive:
            assert archive.testzip() is None
            for name in archive.namelist():
                content = archive.read(name)
                assert checkout not in content
                assert b"site-packages" not in content

    @pytest.mark.parametrize("prepack", [True, False], ids=["prepacked", "plain"])
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_no_device_is_baked_into_the_graph(self, dtype, prepack):
        module = load_plainly(exported("tied", dtype, prepack), "cpu")
        assert "aten::linear" in str(module.inlined_graph)
        assert baked_devices(module) == []

    def test_runs_on_a_device_that_it_was_not_traced_on(self):
        logits, present = run_on_meta(load_plainly(exported(), "meta"))
        assert {tensor.device.type for tensor in (logits, *present)} == {"meta"}
        assert logits.shape == (2, 1, VARIANTS["tied"].vocab_size)


def baked_devices(module: Any) -> list[str]:
    """Return values that name a device, in the graph and its blocks and submodules."""
    graph = module.inlined_graph
    nodes = graph.findAllNodes("prim::Constant", recurse=True)
    outputs = [output for node in nodes for output in node.outputs()]
    return [str(output.node()).strip() for output in outputs if is_device(output.type())]


def is_device(kind: Any) -> bool:
    return kind.kind() == "DeviceObjType" or (
        kind.kind() == "OptionalType" and is_device(kind.getElementType())
    )


def run_on_meta(module: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run one step on the meta device, where reading a value or using another device fails."""
    config = VARIANTS["tied"]
    cache = torch.empty(2, config.num_key_value_heads, 5, config.head_dim, device="meta")
    with torch.jit.optimized_execution(False):  # the optimizer compares constants by value
        logits, *present = module(
            torch.ones(2, 3, dtype=torch.int64, device="meta"),
            torch.ones(2, 8, dtype=torch.int64, device="meta"),
            [cache] * (2 * config.num_hidden_layers),
            torch.tensor([1]),
        )
    return logits, present


class CountsOnItsDevice(torch.nn.Module):
    """A module that traces the device of the example as a constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[0], device=x.device)


class TestBakedDevices:
    """The checks above detect devices."""

    def test_a_traced_device_is_found(self):
        with torchscript_support.torchscript():
            module = torch.jit.trace(CountsOnItsDevice(), torch.ones(3), check_trace=False)
        assert [line for line in baked_devices(module) if 'value="cpu"' in line]

    def test_a_traced_device_fails_elsewhere(self):
        with torchscript_support.torchscript():
            module = torch.jit.trace(CountsOnItsDevice(), torch.ones(3), check_trace=False)
        with pytest.raises(RuntimeError, match="device"):
            module(torch.ones(3, device="meta"))

    def test_a_scripted_device_is_found_in_a_branch(self):
        def branching(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 2:
                return x + torch.zeros(1, device=torch.device("cuda:1"))
            return x

        with torchscript_support.torchscript():
            scripted = torch.jit.script(branching)
        assert [line for line in baked_devices(scripted) if 'value="cuda:1"' in line]


ALONE = """
import json, sys
sys.modules["gemma3_export"] = None  # any import of it fails
import torch
files = {"config.json": ""}
module = torch.jit.load(sys.argv[1], map_location="cpu", _extra_files=files)
config = json.loads(files["config.json"])
shape = (1, config["num_key_value_heads"], 0, config["head_dim"])
past = [torch.empty(shape) for _ in range(2 * config["num_hidden_layers"])]
ids = [int(part) for part in sys.argv[2].split(",")]
new, cached, tokens = ids, 0, []
with torch.inference_mode():
    for _ in range(int(sys.argv[3])):
        cached += len(new)
        mask = torch.ones(1, cached, dtype=torch.int64)
        logits, *past = module(torch.tensor([new]), mask, past, torch.ones(1, dtype=torch.int64))
        new = [int(logits[0, -1].argmax())]
        tokens += new
print(*tokens)
"""
THIN = """
import sys
from pathlib import Path
import numpy as np
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
runtime = TorchScriptRuntime(Path(sys.argv[1]), device="cpu")
runtime.step(np.array([[2, 3, 4]]), runtime.new_cache(1, 8), num_logits=1)
unwanted = ("gemma3_export.reference", "gemma3_export.exporters", "transformers", "onnx")
print(*(name for name in sys.modules if name.startswith(unwanted)))
"""
WHOLE = """
import sys
from pathlib import Path
import numpy as np
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
from tests.support.tiny_models import tiny_config
path = Path(sys.argv[1])
export_bundle(RandomSource(tiny_config(), 0), path, TorchScriptWriter())
runtime = TorchScriptRuntime(path, device="cpu")
runtime.step(np.array([[2, 3, 4]]), runtime.new_cache(1, 8), num_logits=1)
"""


def run_python(code: str, *arguments: object, options: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *options, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


class TestStandsAlone:
    def test_archive_decodes_with_torch_and_nothing_else(self):
        runtime = TorchScriptRuntime(exported(), device="cpu")
        (expected,) = generate(
            runtime, [PROMPT], SamplingParams(), max_new_tokens=12, stop_token_ids=()
        ).collect()
        found = run_python(ALONE, archive_of(exported()), ",".join(map(str, PROMPT)), 12)
        assert tuple(map(int, found.split())) == expected.token_ids

    def test_the_runtime_imports_no_model_definition(self):
        assert run_python(THIN, exported()).split() == []

    def test_the_deprecation_of_torchscript_causes_no_warning(self, tmp_path):
        strict = ("-W", "error::DeprecationWarning:torch", "-W", "error::FutureWarning")
        run_python(WHOLE, tmp_path / "bundle", options=strict)  # and prints nothing


class TestRefusals:
    def test_a_changed_archive_needs_trust(self, tmp_path):
        bundle = export_to(tmp_path / "bundle", "one full layer", "fp32")
        with zipfile.ZipFile(archive_of(bundle), "a") as archive:
            archive.writestr("model/extra/note", "changed")
        with pytest.raises(InputError, match=r"model\.ts.*--trust"):
            TorchScriptRuntime(bundle, device="cpu")
        runtime = TorchScriptRuntime(bundle, device="cpu", trust=True)
        assert np.isfinite(
            runtime.step(np.array([PROMPT]), runtime.new_cache(1, 16), num_logits=1)
        ).all()

    @pytest.mark.parametrize("name", ["config.json", "torchscript/model.ts"])
    def test_a_missing_file_is_named(self, tmp_path, name):
        path = export_to(tmp_path / "bundle", "one full layer", "fp32")
        bundle = Bundle(path)
        (path / name).unlink()
        with pytest.raises(InputError, match=name):
            TorchScriptRuntime(bundle, device="cpu")

    @pytest.mark.parametrize("trust", [False, True])
    def test_a_truncated_archive_is_damaged(self, tmp_path, trust):
        bundle = export_to(tmp_path / "bundle", "one full layer", "fp32")
        content = archive_of(bundle).read_bytes()
        archive_of(bundle).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"model\.ts"):
            TorchScriptRuntime(bundle, device="cpu", trust=trust)

    def test_absent_cuda_is_unavailable(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(UnavailableError, match=r"cuda:0.*0 GPUs.*--device cpu") as caught:
            TorchScriptRuntime(exported(), device="cuda")
        assert caught.value.exit_code == 3

    def test_unknown_device_is_bad_input(self):
        with pytest.raises(InputError, match="tpu"):
            TorchScriptRuntime(exported(), device="tpu")

    def test_python_without_torchscript_is_unavailable(self, monkeypatch):
        Version = namedtuple("Version", "major minor")
        monkeypatch.setattr(torchscript_support.sys, "version_info", Version(3, 14))
        with pytest.raises(UnavailableError, match=r"3\.14.*ONNX"):
            TorchScriptRuntime(exported(), device="cpu")
