"""TorchScript archives with 8-bit matrices: results, storage and rejected options."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma3_export.api.exporting import export_torchscript
from gemma3_export.bundle import BlockFormat, Bundle
from gemma3_export.errors import InputError, ParityError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.torch.matrix import FEW_ROWS, BlockedMatrix
from gemma3_export.exporters.torch.modules import blocked_matrix
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.parity import ParityReport, VerifyOptions, verify
from gemma3_export.reference.weights.block_matrix import BlockMatrix, quantize
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights, owner_of
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime, TorchScriptRuntime
from gemma3_export.runtimes.torch.torchscript import torchscript
from tests.support.exported_bundles import exported
from tests.support.observed_runs import VARIANTS
from tests.support.tiny_models import tiny_config

CONFIG = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
# With random weights the two best tokens are almost equally likely.
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4, min_top1=0.85)


def source(tied: bool = True) -> RandomSource:
    return RandomSource(CONFIG if tied else tiny_config(tie_word_embeddings=False), 5)


@functools.cache
def int8_bundle(tied: bool) -> Bundle:
    writer = TorchScriptWriter(dtype="int8", block_size=16)
    return Bundle(exported(writer, source(tied).config, 5))


def check(runtime: ArchiveRuntime, bundle: Bundle, full: RandomSource | None) -> ParityReport:
    weights = open_bundle_weights(bundle, "torchscript")
    return verify(runtime, weights, options=OPTIONS, full_source=full)


def load_plainly(path: Path) -> Any:
    with torchscript():
        load: Any = torch.jit.load
        return load(str(path / "torchscript" / "model_quantized.ts"))


@pytest.mark.parametrize("tied", [True, False])
def test_archives_compute_what_the_reference_computes_with_rounded_weights(tied: bool) -> None:
    bundle = int8_bundle(tied)
    runtime = TorchScriptRuntime(bundle, device="cpu")
    report = check(runtime, bundle, source(tied))
    assert report.passed
    assert report.noise_floor_dtype == "bfloat16"
    assert 0 < report.gates[1].metrics[0].value < 0.01


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.qkv", "model.embed_tokens"],
)
def test_a_block_whose_scales_are_twice_as_large_is_found(name: str) -> None:
    bundle = int8_bundle(True)
    runtime = TorchScriptRuntime(bundle, device="cpu")
    owner_of(runtime.module, f"{name}.weight").scales[0] *= 2
    assert not check(runtime, bundle, None).passed


def test_weights_read_back_are_those_that_the_quantizer_made() -> None:
    weights = open_bundle_weights(int8_bundle(True), "torchscript")
    block_format = BlockFormat(bits=8, block_size=16)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        wanted = quantize(source().read(name), block_format).dequantize()
        assert torch.equal(weights.read(name), wanted)
        assert torch.equal(weights.read(name, 3, 9), wanted[3:9])


def test_an_archive_is_about_a_quarter_of_one_in_float32() -> None:
    config = replace(VARIANTS["wide"], intermediate_size=128, head_dim=32)
    path = exported(TorchScriptWriter(dtype="int8", block_size=64), config, 5)
    float32 = config.num_parameters * 4
    assert (path / "torchscript" / "model_quantized.ts").stat().st_size < 0.28 * float32
    # Only norms, frequencies, codes and scales, in memory too.
    tensors = {t.data_ptr(): t.nbytes for t in load_plainly(path).state_dict().values()}
    assert sum(tensors.values()) < 0.28 * float32


def test_embedding_and_head_share_one_matrix() -> None:
    module = load_plainly(int8_bundle(True).path)
    head, embedding = module.decoder.head.matrix, module.decoder.model.embed_tokens.matrix
    assert head.codes.data_ptr() == embedding.codes.data_ptr()
    assert head.scales.data_ptr() == embedding.scales.data_ptr()


def test_an_archive_runs_with_torch_alone_and_without_a_device_in_it() -> None:
    module = load_plainly(int8_bundle(True).path)
    assert "Device" not in str(module.inlined_graph)
    shape = (1, CONFIG.num_key_value_heads, 0, CONFIG.head_dim)
    past = [torch.empty(shape, dtype=torch.bfloat16)] * (2 * CONFIG.num_hidden_layers)
    ids = torch.tensor([[2, 30, 31, 32]])
    with torch.inference_mode():
        logits, *_ = module(ids, torch.ones_like(ids), past, torch.tensor([0]))
    runtime = TorchScriptRuntime(int8_bundle(True), device="cpu")
    ours = runtime.step(ids.numpy(), runtime.new_cache(1, 8), num_logits=0)
    assert np.array_equal(logits.numpy(), ours)


def random_matrix(rows: int, columns: int, block_size: int) -> BlockMatrix:
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return quantize(weights, BlockFormat(bits=8, block_size=block_size))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("count", [1, FEW_ROWS, FEW_ROWS + 1])
def test_product_errors_are_those_of_bfloat16(block_size: int, count: int) -> None:
    stored = random_matrix(97, 512, block_size)
    matrix = blocked_matrix(stored)
    matrix.dequantized_outputs = 40  # the last one is smaller
    with torchscript():
        scripted: Any = torch.jit.script(matrix)
    x = torch.randn(2, count, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    for part in (x[:1], x) if count == FEW_ROWS else (x[:1],):
        exact = part.double() @ stored.dequantize().double().T
        error = (scripted(part).double() - exact).norm() / exact.norm()
        assert error < 2**-8
        assert (scripted.forward_float32(part).double() - exact).norm() / exact.norm() < 2**-8


def test_a_processor_without_bfloat16_multiplies_many_rows_in_float32(monkeypatch: Any) -> None:
    stored = random_matrix(40, 64, 32)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2)).bfloat16()

    class WithoutBfloat16:
        def _is_mkldnn_bf16_supported(self) -> bool:
            return False

    matrix: BlockedMatrix = blocked_matrix(stored)
    monkeypatch.setattr(torch.ops, "mkldnn", WithoutBfloat16())
    found: Tensor = matrix.forward_float32(x)
    torch.testing.assert_close(found, x.float() @ stored.dequantize().T)


def test_an_export_over_its_budget_leaves_no_output(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="mean_kld"):
        export_torchscript(source(), tmp_path / "out", dtype="int8", block_size=16, max_kld=1e-7)
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_blocks_and_budget() -> None:
    graph = int8_bundle(True).graph("torchscript")
    blocks = {recipe.blocks for recipe in graph.weights.values() if len(recipe.names) > 1}
    assert blocks == {BlockFormat(bits=8, block_size=16)}
    assert (graph.dtype, graph.cache_dtype, graph.max_kld) == ("int8", "bfloat16", 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8", "block_size": 48}, r"block size 48 is not supported.*64"),
        ({"dtype": "int8", "prepack": False}, r"--no-prepack cannot.*oneDNN"),
        ({"dtype": "int4"}, r"'int4'.*int8"),
        ({"dtype": "keep"}, r"'keep'.*int8"),
    ],
)
def test_unsupported_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TorchScriptWriter(**options)


def test_matrices_that_blocks_cannot_tile_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"48 columns.*block size 32"):
        export_bundle(source(), tmp_path / "out", TorchScriptWriter(dtype="int8", block_size=32))
    assert not (tmp_path / "out").exists()
