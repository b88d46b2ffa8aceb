"""4-bit and mixed exports: calibration text, rounding, and divergence budgets."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma3_export.api.opening import open_runtime
from gemma3_export.api.verification import ParityCheck
from gemma3_export.api.verification import verify as verify_bundle
from gemma3_export.bundle import BlockFormat, Bundle
from gemma3_export.dtypes import EXPORT_DTYPES
from gemma3_export.errors import InputError, ParityError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.quantize.calibration import (
    CalibrationData,
    CalibrationOptions,
    calibration_from_file,
)
from gemma3_export.exporters.quantize.gptq import GptqRounding, Hessian
from gemma3_export.exporters.quantize.gptq_quantizer import GptqQuantizer
from gemma3_export.exporters.quantize.mixed_precision import (
    DivergenceMeter,
    FormatOption,
    choose_formats,
)
from gemma3_export.exporters.quantize.quantizers import matrix_names
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.parity import VerifyOptions, verify
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.weights.block_matrix import quantize
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from tests.support.exported_bundles import exported, exported_bundle
from tests.support.tiny_models import tiny_config
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

CONFIG = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
SOURCE = RandomSource(CONFIG, 5)
PLAN = CalibrationOptions(sequences=24, tokens=24)
FORMAT = BlockFormat(bits=4, block_size=16)
# With random weights the two best tokens are almost equally likely.
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4, min_top1=0.5)


def ignore(stage: str, done: int, total: int) -> None:
    del stage, done, total


@functools.cache
def calibrated_bundle(dtype: str, max_kld: float, seed: int = 0) -> Bundle:
    plan = CalibrationOptions(sequences=24, tokens=24, seed=seed)
    writer = OnnxWriter(dtype=dtype, block_size=16, max_kld=max_kld, calibration=plan)
    return Bundle(exported(writer, CONFIG, 5))


def correlated_inputs(columns: int, positions: int = 512) -> torch.Tensor:
    """Return correlated inputs [P, K] of different magnitudes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    few = torch.randn(positions, columns // 4, generator=generator)
    return few @ mixing + 0.1 * torch.randn(positions, columns, generator=generator)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian.mean()


def output_error(found: torch.Tensor, weights: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((found - weights) @ inputs.T).square().mean())


# Rounding


def test_gptq_halves_the_output_error_of_rounding_to_nearest() -> None:
    inputs = correlated_inputs(64)
    weights = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    nearest = output_error(quantize(weights, FORMAT).dequantize(), weights, inputs)
    blind = GptqRounding(torch.eye(64), FORMAT).quantize(weights)
    found = GptqRounding(hessian_of(inputs), FORMAT).quantize(weights)
    assert output_error(found.dequantize(), weights, inputs) < 0.5 * nearest
    assert output_error(blind.dequantize(), weights, inputs) > 0.9 * nearest


def test_without_correlations_gptq_rounds_to_the_nearest_codes() -> None:
    weights = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    found = GptqRounding(torch.eye(64), FORMAT).quantize(weights)
    expected = quantize(weights, FORMAT)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_are_always_zero_are_harmless(bits: int) -> None:
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    inputs = correlated_inputs(64)
    for dead in (inputs * (torch.arange(64) % 3 > 0), torch.zeros(9, 64)):
        found = GptqRounding(hessian_of(dead), BlockFormat(bits=bits, block_size=16))
        assert torch.isfinite(found.quantize(weights).dequantize()).all()


def test_a_calibrated_model_diverges_less_than_a_rounded_one(tmp_path: Path) -> None:
    ids = PLAN.load(SOURCE, None, ignore).ids
    text = CalibrationData(ids=ids[:-8], description={})
    formats = dict.fromkeys(matrix_names(CONFIG), FORMAT)
    blocks = GptqQuantizer(SOURCE, text, tmp_path, ignore).quantize(formats)
    meter = DivergenceMeter(load_reference(SOURCE), ids[-8:])
    weights = {name: SOURCE.read(name) for name in formats}
    nearest = ((name, quantize(weight, FORMAT).dequantize()) for name, weight in weights.items())
    found = ((name, blocks.load(name).dequantize()) for name in formats)
    assert meter.measure(found, {}) < 0.95 * meter.measure(nearest, {})
    assert meter.measure((), {}) == 0  # and restores all weights


# Exports


def test_int4_exports_compute_what_the_reference_computes_with_their_weights() -> None:
    bundle = calibrated_bundle("int4", 0.1)
    weights = bundle.graph("onnx").weights.values()
    assert {recipe.blocks for recipe in weights if recipe.blocks} == {FORMAT}
    report = verify(
        open_runtime(bundle, "onnx"),
        open_bundle_weights(bundle, "onnx"),
        options=OPTIONS,
        full_source=SOURCE,
    )
    assert report.gates[0].passed
    assert 1e-4 < report.gates[1].metrics[0].value < 0.01
    assert {path.name for path in bundle.path.iterdir()} == {
        *("config.json", "generation_config.json", "genai_config.json", "manifest.json", "onnx"),
        *("README.md", ".gitattributes"),
    }


def test_the_manifest_describes_the_text_and_a_seed_reproduces_it(tmp_path: Path) -> None:
    first = calibrated_bundle("int4", 0.1)
    described = first.graph("onnx").calibration
    assert described is not None
    assert (described["kind"], described["sequences"], described["tokens"]) == ("sampled", 24, 24)
    path = tmp_path / "again"
    writer = OnnxWriter(dtype="int4", block_size=16, max_kld=0.1, calibration=PLAN)
    export_bundle(SOURCE, path, writer)
    again = Bundle(path)
    assert again.graph("onnx").calibration == described
    name = "onnx/model_q4.onnx_data"
    assert again.manifest.files[name] == first.manifest.files[name]
    other = calibrated_bundle("mixed", 0.001, seed=1).graph("onnx").calibration
    assert other is not None
    assert other["ids_sha256"] != described["ids_sha256"]


def test_mixed_exports_meet_their_budget_and_shrink_as_it_grows() -> None:
    sizes = []
    for max_kld in (0.001, 0.002):
        bundle = calibrated_bundle("mixed", max_kld, seed=1)
        report = verify(
            open_runtime(bundle, "onnx"),
            open_bundle_weights(bundle, "onnx"),
            options=OPTIONS,
            full_source=SOURCE,
        )
        assert report.gates[0].passed
        assert report.gates[1].metrics[0].value < max_kld * 1.3  # on text of its own
        sizes.append(bundle.file("onnx/model_mixed.onnx_data").stat().st_size)
    assert sizes[0] > sizes[1]
    recipes = calibrated_bundle("mixed", 0.001, seed=1).graph("onnx").weights.values()
    assert {recipe.blocks.bits for recipe in recipes if recipe.blocks} == {4, 8}


@pytest.mark.parametrize("dtype", ["int4", "mixed"])
def test_matrices_that_blocks_cannot_tile_are_rejected(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="48 columns, not a multiple of the block size 32"):
        export_bundle(SOURCE, tmp_path / "bundle", OnnxWriter(dtype=dtype, calibration=PLAN))
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_an_unreachable_budget_names_the_best_divergence(
    tmp_path: Path,
) -> None:
    writer = OnnxWriter(dtype="mixed", block_size=16, max_kld=1e-8, calibration=PLAN)
    with pytest.raises(InputError, match=r"1e-08 nats.*the best has \d"):
        export_bundle(SOURCE, tmp_path / "bundle", writer)
    assert list(tmp_path.iterdir()) == []


def test_int4_over_its_budget_names_the_divergence_and_leaves_no_output(
    tmp_path: Path,
) -> None:
    writer = OnnxWriter(dtype="int4", block_size=16, max_kld=1e-6, calibration=PLAN)
    with pytest.raises(ParityError, match=r"mean_kld is 0\.00"):
        export_bundle(SOURCE, tmp_path / "bundle", writer, verification=ParityCheck())
    assert list(tmp_path.iterdir()) == []


def test_default_budgets_follow_the_dtype() -> None:
    assert OnnxWriter(dtype="int8").budget == 0.01
    assert OnnxWriter(dtype="mixed").budget == EXPORT_DTYPES["mixed"].max_kld == 0.05
    assert OnnxWriter(dtype="mixed", max_kld=0.2).budget == 0.2


@pytest.mark.parametrize("max_kld", [0.0, -0.1, float("nan"), float("inf")])
def test_impossible_budgets_are_rejected(max_kld: float) -> None:
    for attempt in (
        lambda: OnnxWriter(max_kld=max_kld),
        lambda: TorchScriptWriter(max_kld=max_kld),
        lambda: verify_bundle(exported_bundle("ort"), max_kld=max_kld, threads=1),
    ):
        with pytest.raises(InputError, match=rf"max_kld.* is {max_kld}; it must be a number"):
            attempt()


# Calibration text


def test_sequences_are_spread_over_the_whole_file(tmp_path: Path) -> None:
    tokenizer = tiny_gemma_tokenizer(400)
    file = tmp_path / "text.txt"
    file.write_text("One two three, and so on. " * 400, encoding="utf-8")
    plan = CalibrationOptions(file=file, sequences=24, tokens=24)
    source = RandomSource(tiny_config(vocab_size=tokenizer.vocab_size), 5)
    text = plan.load(source, tokenizer, ignore)
    assert text.ids.shape == (24, 24)
    assert (text.ids[:, 0] == source.config.bos_token_id).all()
    assert text.description["kind"] == "file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"too short", r"text\.txt has \d+ tokens, but calibration needs 552"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "does not exist"),
    ],
)
def test_unusable_calibration_text_is_rejected(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        replace(PLAN, file=file).load(SOURCE, tiny_gemma_tokenizer(400), ignore)


def test_a_file_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a tokenizer"):
        CalibrationOptions(file=tmp_path / "text.txt").load(SOURCE, None, ignore)


# Choosing


def test_the_option_that_saves_the_most_divergence_per_byte_comes_first() -> None:
    small, large = FORMAT, BlockFormat(bits=8, block_size=16)

    def options(divergence: float, size: int) -> list[FormatOption]:
        return [
            FormatOption(format=small, size_bytes=size, divergence=divergence),
            FormatOption(format=large, size_bytes=2 * size, divergence=divergence / 200),
        ]

    products = [options(0.1, 100), options(0.1, 10), options(0.01, 10)]
    bits = [
        [option.format.bits for option in choose_formats(products, budget)]
        for budget in (1.0, 0.15, 0.05, 0.0)
    ]
    assert bits == [[4, 4, 4], [4, 8, 4], [8, 8, 4], [8, 8, 8]]


def test_smaller_options_are_restored_when_a_large_step_leaves_room() -> None:
    small, large = FORMAT, BlockFormat(bits=8, block_size=16)
    cheap = [
        FormatOption(format=small, size_bytes=10, divergence=0.1),
        FormatOption(format=large, size_bytes=20, divergence=0.0),
    ]
    table = [
        FormatOption(format=small, size_bytes=1000, divergence=0.3),
        FormatOption(format=large, size_bytes=2000, divergence=0.0),
    ]
    chosen = choose_formats([cheap, table], 0.2)  # takes the cheap step, then needs the other
    assert [option.format for option in chosen] == [small, large]


def test_only_part_of_a_long_calibration_text_is_tokenized(tmp_path, monkeypatch):
    text = "".join(f"One, two and {number:07}. " for number in range(8_000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("gemma3_export.exporters.quantize.calibration.MAX_CHARACTERS", 24_000)
    tokenizer = tiny_gemma_tokenizer(400)
    config = tiny_config(vocab_size=400)
    seen: list[str] = []

    class Counting:
        def encode_ordinary(self, text: str) -> list[int]:
            seen.append(text)
            return tokenizer.encode_ordinary(text)

    found = calibration_from_file(tmp_path / "text.txt", Counting(), config, PLAN)
    assert found.ids.shape == (24, 24)
    assert len(seen[0]) == 24_000
    assert seen[0].startswith(text[:1000])
    assert seen[0].endswith(text[-1000:])
    assert calibration_from_file(tmp_path / "text.txt", tokenizer, config, PLAN).ids.equal(
        found.ids
    )
