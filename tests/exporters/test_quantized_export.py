"""Quantized ONNX exports: stored blocks, repacked GGUF blocks, and parity."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch

import gemma3_export
from gemma3_export.api.opening import open_runtime
from gemma3_export.api.verification import ParityCheck
from gemma3_export.bundle import BlockFormat, Bundle, common_format
from gemma3_export.errors import InputError, ParityError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.parity import ParityReport, VerifyOptions, verify
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.block_matrix import (
    BlockMatrix,
    pack_codes,
    quantize,
    unpack_codes,
)
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.exported_bundles import accept_changes, exported
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf

CONFIG = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
# With random weights the two best tokens are almost equally likely.
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4, min_top1=0.85)


@functools.cache
def int8_bundle(tied: bool) -> Bundle:
    config = (
        CONFIG
        if tied
        else tiny_config(
            tie_word_embeddings=False, num_hidden_layers=1, layer_types=("full_attention",)
        )
    )
    return Bundle(exported(OnnxWriter(dtype="int8", block_size=16), config, 5))


def check(bundle: Bundle, full: RandomSource | None = None) -> ParityReport:
    return verify(
        open_runtime(bundle, "onnx"),
        open_bundle_weights(bundle, "onnx"),
        options=OPTIONS,
        full_source=full,
    )


def operators(bundle: Bundle) -> list[str]:
    path = bundle.file(bundle.graph("onnx").path)
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("tied", [True, False])
def test_int8_exports_compute_what_the_reference_computes_with_rounded_weights(tied: bool) -> None:
    bundle = int8_bundle(tied)
    report = check(bundle, RandomSource(bundle.config, 5))
    assert report.passed
    kld = report.gates[1].metrics[0].value
    assert 0 < kld < 0.01  # gate B compares with the weights before rounding
    assert report.gates[1].question == "How far are these weights from full precision?"


def test_a_check_without_the_original_weights_does_not_claim_their_distance() -> None:
    report = gemma3_export.verify(int8_bundle(True), threads=1)
    assert report.passed
    assert "with the same quantized weights? To compare with full" in report.gates[1].question


def test_all_matrices_are_quantized_and_the_tied_embedding_is_stored_once() -> None:
    bundle = int8_bundle(True)
    found = operators(bundle)
    assert "MatMul" not in found
    assert "Gemm" not in found
    graph = onnx.load(bundle.file("onnx/model_quantized.onnx"), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.external_data}
    assert not any(
        node.op_type == "Gather" and not weights.isdisjoint(node.input) for node in graph.node
    )
    assert found.count("MatMulNBits") == 4 * 2 + 1
    assert found.count("GatherBlockQuantized") == 1


def test_both_graphs_compute_the_same_bits_within_the_window() -> None:
    """Rounded activations would amplify any other rounding, as of norms that are not fused."""
    config = replace(CONFIG, sliding_window=40)
    bundle = Bundle(exported(OnnxWriter(dtype="int8", block_size=16), config, 5))
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (1, 36))
    logits = []
    for is_windowed in (False, True):
        runtime = OnnxRuntime(bundle, device="cpu", threads=1, sliding_window_cache=is_windowed)
        cache = runtime.new_cache(1, tokens.shape[1])
        steps = [tokens[:, :20], *np.split(tokens[:, 20:], 16, axis=1)]
        logits.append([runtime.step(step, cache, num_logits=1) for step in steps])
    np.testing.assert_array_equal(*logits)


def test_the_file_holds_only_tensors_and_their_alignment() -> None:
    bundle = int8_bundle(True)
    wanted, tensors = 0, 0
    shapes = dict(bundle.config.weight_shapes())
    for recipe in bundle.graph("onnx").weights.values():
        rows = sum(shapes[name][0] for name in recipe.names)
        columns = shapes[recipe.names[0]][1] if recipe.blocks else 1
        wanted += recipe.blocks.size_bytes(rows, columns) if recipe.blocks else rows * 4
        tensors += 2 if recipe.blocks else 1
    size = bundle.file("onnx/model_quantized.onnx_data").stat().st_size
    assert wanted <= size <= wanted + 4096 * tensors


@pytest.mark.parametrize("change", ["scale", "code", "norm"])
def test_a_changed_weight_in_the_file_is_found(change: str, tmp_path: Path) -> None:
    source = RandomSource(CONFIG, 5)
    path = tmp_path / "bundle"
    export_bundle(source, path, OnnxWriter(dtype="int8", block_size=16))
    right = open_bundle_weights(Bundle(path), "onnx")
    names = {
        "scale": "model.layers.1.mlp.down_proj.weight.scales",
        "code": "model.layers.0.self_attn.qkv.weight.codes",
        "norm": "model.layers.1.pre_feedforward_layernorm.weight",
    }
    read = {name: right.read(name).clone() for name in dict(CONFIG.weight_shapes())}
    graph = onnx.load(path / "onnx" / "model_quantized.onnx", load_external_data=False).graph
    (tensor,) = [item for item in graph.initializer if item.name == names[change]]
    place = {entry.key: entry.value for entry in tensor.external_data}
    size = int(place["length"])
    data = np.memmap(path / "onnx" / "model_quantized.onnx_data", mode="r+")
    part = data[int(place["offset"]) : int(place["offset"]) + size]
    if change == "code":
        part[: size // 8] ^= 16
    else:
        part.view(np.float32)[: size // 4] += 0.3 * np.abs(part.view(np.float32)).mean()
    data.flush()
    accept_changes(path)

    class Unchanged(RandomSource):
        activation_blocks = right.activation_blocks

        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            return read[name][start:stop]

    report = verify(open_runtime(Bundle(path), "onnx"), Unchanged(CONFIG, 5), options=OPTIONS)
    assert not report.passed


@pytest.mark.parametrize("constant", ["rope_local_base_freq", "query_pre_attn_scalar", "window"])
def test_int8_does_not_hide_a_wrong_constant(constant: str) -> None:
    bundle = int8_bundle(True)
    changes = {
        "rope_local_base_freq": {"rope_local_base_freq": 30_000.0},
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 16},
        "window": {"sliding_window": CONFIG.sliding_window + 1},
    }
    source = open_bundle_weights(bundle, "onnx")
    source.config = tiny_config(
        num_hidden_layers=2, layer_types=CONFIG.layer_types, **changes[constant]
    )
    assert not verify(open_runtime(bundle, "onnx"), source, options=OPTIONS).passed


def test_float_products_reveal_errors_that_int8_activations_hide() -> None:
    bundle = int8_bundle(True)
    source = open_bundle_weights(bundle, "onnx")
    source.config = tiny_config(
        num_hidden_layers=2, layer_types=CONFIG.layer_types, rope_local_base_freq=20_050.0
    )
    report = verify(open_runtime(bundle, "onnx"), source, options=OPTIONS)
    failed = [case.name for case in report.cases if not case.passed]
    assert failed
    assert all(name.startswith("float-") for name in failed)
    assert not report.passed


def test_an_export_over_its_budget_names_the_divergence_and_leaves_no_output(
    tmp_path: Path,
) -> None:
    path = tmp_path / "bundle"
    writer = OnnxWriter(dtype="int8", block_size=16, max_kld=1e-9)
    message = r"^the weights diverge too far.* mean_kld is .* --max-kld, 1e-09 here: raise it"
    with pytest.raises(ParityError, match=message):
        export_bundle(RandomSource(CONFIG, 5), path, writer, verification=ParityCheck())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (OnnxWriter(dtype="int8", block_size=32), "48 columns, not a multiple of"),
        (OnnxWriter(dtype="keep"), "no quantized matrix"),
    ],
)
def test_unquantizable_weights_are_rejected(
    writer: OnnxWriter, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(RandomSource(CONFIG, 5), tmp_path / "bundle", writer)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("size", [0, 8, 48, 512])
def test_block_sizes_without_a_kernel_are_rejected(size: int) -> None:
    with pytest.raises(InputError, match=f"block size {size} is not supported"):
        BlockFormat(bits=8, block_size=size)


# Quantized GGUF


GGUF_CONFIG = tiny_config(
    hidden_size=256,
    intermediate_size=512,
    head_dim=64,
    num_attention_heads=4,
    num_hidden_layers=1,
    layer_types=("sliding_attention",),
)
KEPT = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # offsets of a block's float16 numbers


def random_blocks(rows: int, columns: int, kind: str, seed: int) -> np.ndarray:
    """Return a random K block: any bytes are valid if its float16 numbers are finite."""
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        scales = generator.uniform(1e-5, 3e-5, (rows, columns // block, 1)).astype(np.float16)
        data[..., offset : offset + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.fixture
def random_k_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace quantization to K types, which the gguf package lacks, with random blocks."""
    quantize_with_gguf = gguf.quants.quantize

    def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        if kind.name in HALVES:
            return random_blocks(*values.shape, kind.name, seed=values.size)
        return quantize_with_gguf(values, kind)

    monkeypatch.setattr("gguf.quants.quantize", quantize)


@pytest.mark.usefixtures("random_k_blocks")
@pytest.mark.parametrize("kind", KEPT)
def test_every_weight_of_a_repacked_gguf_is_bit_equal(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, GGUF_CONFIG, tiny_weights(GGUF_CONFIG), kind)
    with open_weights(str(path)) as source:
        export_bundle(source, tmp_path / "bundle", OnnxWriter(dtype="keep"))
        bundle = Bundle(tmp_path / "bundle")
        kept = open_bundle_weights(bundle, "onnx")
        for name, _ in GGUF_CONFIG.weight_shapes():
            assert torch.equal(
                kept.read(name).view(torch.int32), source.read(name).float().view(torch.int32)
            ), name
    assert "MatMul" not in operators(bundle)
    assert check(bundle).passed


@pytest.mark.usefixtures("random_k_blocks")
def test_a_repacked_block_whose_minimum_is_not_finite_is_rejected(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = tmp_path / "model.gguf"
    write_gguf(path, GGUF_CONFIG, tiny_weights(GGUF_CONFIG), "Q4_K")
    with open_weights(str(path)) as source:
        tensor = source.gguf_tensor(name)
        assert tensor is not None
        offset = tensor.data_offset + HALVES["Q4_K"][1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.float16(np.nan).tobytes())
    with (
        open_weights(str(path)) as source,
        pytest.raises(InputError, match=rf"{name} has 8 values that are NaN"),
    ):
        export_bundle(source, tmp_path / "bundle", OnnxWriter(dtype="keep"))
    assert not (tmp_path / "bundle").exists()


def test_packed_matrices_of_different_types_share_a_format_without_loss() -> None:
    four = BlockFormat(bits=4, block_size=32, has_minimum=True)
    eight = BlockFormat(bits=8, block_size=16)
    both = common_format([four, eight])
    assert both == BlockFormat(bits=8, block_size=16, has_minimum=True)
    generator = torch.Generator().manual_seed(0)
    for block_format in (four, eight):
        blocks = 64 // block_format.block_size
        matrix = BlockMatrix(
            block_format,
            torch.randint(0, 2**block_format.bits, (3, 64), generator=generator).to(torch.uint8),
            torch.rand(3, blocks, generator=generator),
            torch.rand(3, blocks, generator=generator) if block_format.has_minimum else None,
        )
        assert torch.equal(matrix.convert(both).dequantize(), matrix.dequantize())


def test_the_error_for_an_unsupported_quantization_names_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, GGUF_CONFIG, tiny_weights(GGUF_CONFIG), "Q4_1")
    with (
        open_weights(str(path)) as source,
        pytest.raises(InputError, match=r"token_embd\.weight is quantized as Q4_1"),
    ):
        export_bundle(source, tmp_path / "bundle", OnnxWriter(dtype="keep"))


# Blocks in memory


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_packing(bits: int) -> None:
    block_format = BlockFormat(bits=bits, block_size=16)
    matrix = quantize(torch.randn(5, 48, generator=torch.Generator().manual_seed(1)), block_format)
    assert torch.equal(unpack_codes(pack_codes(matrix), block_format), matrix.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_errors_are_at_most_half_a_step_without_clipping(bits: int) -> None:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    weights[3, 16:32] = 0
    matrix = quantize(weights, BlockFormat(bits=bits, block_size=16))
    error = (matrix.dequantize() - weights).abs().view(64, 4, 16)
    inside = (matrix.codes > 0) & (matrix.codes < 2**bits - 1)
    steps = matrix.scales.abs()[..., None].expand(64, 4, 16)
    assert (error <= steps * 0.5001)[inside.view(64, 4, 16)].all()
    assert (matrix.dequantize()[3, 16:32] == 0).all()


def test_searched_4_bit_scales_have_smaller_errors_than_unclipped_ones() -> None:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    block_format = BlockFormat(bits=4, block_size=32)
    found = quantize(weights, block_format).dequantize()
    blocks = weights.view(64, 2, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    plain = ((blocks / scale).round().clamp(-8, 7) * scale).view(64, 64)
    assert (found - weights).square().sum() < 0.95 * (plain - weights).square().sum()
