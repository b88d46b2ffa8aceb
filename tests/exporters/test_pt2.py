"""torch.export programs: bit-equal to the reference, and independent of its code."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma3_export.device import CudaOptions
from gemma3_export.dtypes import torch_dtype
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.torch.pt2 import Pt2Writer
from gemma3_export.parity import verify
from gemma3_export.runtimes.torch import runtime as archive_runtime
from gemma3_export.runtimes.torch.runtime import Pt2Runtime
from tests.support.observed_runs import VARIANTS, observe, reference, source_of

pytestmark = pytest.mark.slow  # torch takes seconds to trace, and as long to load

THIN = """
import sys
from pathlib import Path
import numpy as np
from gemma3_export.runtimes.torch.runtime import Pt2Runtime
runtime = Pt2Runtime(Path(sys.argv[1]))
runtime.step(np.array([[2, 3, 4]]), runtime.new_cache(1, 8), num_logits=1)
unwanted = ("gemma3_export.reference", "gemma3_export.exporters", "transformers", "onnx")
print(*(name for name in sys.modules if name.startswith(unwanted)))
"""


def export(path: Path, variant: str, dtype: str = "fp32") -> Path:
    return export_bundle(source_of(variant), path, Pt2Writer(dtype=dtype)).path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A shared bundle; do not change what is in it."""
    return export(tmp_path_factory.mktemp("pt2") / "bundle", "one sliding layer")


def archive_of(path: Path) -> Path:
    return path / "pt2" / "model.pt2"


class TestComputation:
    @pytest.mark.parametrize(
        ("variant", "dtype"),
        [("one sliding layer", "fp32"), ("one full layer, untied", "bf16"), ("two layers", "fp16")],
    )
    def test_computes_what_the_reference_computes(self, tmp_path, variant, dtype):
        runtime = Pt2Runtime(export(tmp_path / "bundle", variant, dtype))
        expected = observe(reference(variant, torch_dtype(dtype)))
        for found, exact in zip(observe(runtime), expected, strict=True):
            np.testing.assert_array_equal(found, exact)

    def test_padded_batches_are_part_of_parity(self, bundle):
        report = verify(Pt2Runtime(bundle), source_of("one sliding layer"))
        assert report.passed
        assert "padded" in {case.name for case in report.cases}

    def test_describes_itself(self, bundle):
        found = Pt2Runtime(bundle).info.to_json()
        assert (found["runtime"], found["dtype"], found["device"]) == ("pt2", "float32", "cpu")


class TestArchive:
    def test_carries_its_config(self, bundle):
        files = {"config.json": ""}
        torch.export.load(archive_of(bundle), extra_files=files)
        assert json.loads(files["config.json"]) == json.loads((bundle / "config.json").read_text())

    def test_carries_no_paths_of_the_machine_that_exported(self, bundle):
        checkout = str(Path(__file__).parents[2]).encode()
        with zipfile.ZipFile(archive_of(bundle)) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                assert checkout not in content
                assert b"site-packages" not in content

    def test_stores_each_weight_once(self, bundle):
        size = archive_of(bundle).stat().st_size
        assert size < 4 * VARIANTS["one sliding layer"].num_parameters + 2**20

    def test_the_runtime_imports_no_model_definition(self, bundle):
        done = subprocess.run(
            [sys.executable, "-c", THIN, str(bundle)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


class TestDevices:
    def test_runs_on_a_device_that_it_was_not_traced_on(self, bundle, monkeypatch):
        """The meta device replaces a GPU: it computes no values, but tensors have a device."""
        monkeypatch.setattr(archive_runtime, "torch_device", torch.device)
        runtime = Pt2Runtime(bundle, device="meta")
        config = VARIANTS["one sliding layer"]
        shape = (2, config.num_key_value_heads, 5, config.head_dim)
        cache = torch.empty(shape, device="meta")
        ids, mask = (torch.ones(2, n, dtype=torch.int64, device="meta") for n in (3, 8))
        # The number of kept tokens is a value, which meta tensors lack, so keep all.
        with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
            logits, *present = runtime.module(ids, mask, [cache] * 2, runtime.num_logits_tensor(3))
        assert {tensor.device.type for tensor in (logits, *present)} == {"meta"}
        assert logits.shape == (2, 3, config.vocab_size)


class TestRefusals:
    def test_damage_is_bad_input_with_and_without_trust(self, tmp_path):
        path = export(tmp_path / "bundle", "one full layer, untied")
        content = archive_of(path).read_bytes()
        archive_of(path).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"model\.pt2.*--trust"):
            Pt2Runtime(path)
        with pytest.raises(InputError, match=r"cannot load .*model\.pt2"):
            Pt2Runtime(path, trust=True)

    def test_a_missing_gpu_is_unavailable(self, bundle, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(UnavailableError, match=r"cuda:0.*--device cpu"):
            Pt2Runtime(bundle, device="cuda")

    def test_a_program_that_reads_the_host_cannot_be_a_cuda_graph(self, bundle, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(InputError, match=r"steps of the pt2 runtime read.*torchscript"):
            Pt2Runtime(bundle, device="cuda", cuda=CudaOptions(graph=True))

    def test_unknown_dtype_is_rejected(self):
        with pytest.raises(InputError, match="int3"):
            Pt2Writer(dtype="int3")
