"""Several dtypes in one bundle: file names, the choice of a variant, and additions."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import gemma3_export
from gemma3_export.bundle import Bundle, Graph, graph_stem, variant_name
from gemma3_export.bundle.inspection import read_proofs
from gemma3_export.dtypes import EXPORT_DTYPES, DType
from gemma3_export.errors import InputError, ParityError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from tests.support.command_line import error_line, run, run_ok
from tests.support.exported_bundles import edit_json, exported, made_once, source_of

INT8 = OnnxWriter(dtype="int8", block_size=16)
GENERATE = ("--prompt-ids", "2,9,4", "--max-new-tokens", 24, "--json")


@pytest.fixture(scope="module")
def several(ort_bundle: Path, tiny_folder: Path) -> Path:
    """Return a bundle with fp32, to which int8 was added, both verified; do not change it."""

    def make(path: Path) -> None:
        shutil.copytree(ort_bundle, path)
        options = ("--dtype", "int8", "--block-size", 16, "--max-kld", 0.05, "--threads", 1)
        result = run_ok("onnx", "--weights", tiny_folder, *options, "-o", path)
        assert f"generate {path} --variant int8 --prompt" in result.stdout

    return made_once("variants", make)


@pytest.fixture
def copied(several: Path, tmp_path: Path) -> Path:
    return shutil.copytree(several, tmp_path / "copied")


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("dtype", "activations", "variant", "stem"),
    [
        ("fp32", "float32", "fp32", "model"),
        ("bf16", "bfloat16", "bf16", "model_bf16"),
        ("fp16", "float16", "fp16", "model_fp16"),
        ("int8", "float32", "int8", "model_quantized"),
        ("int4", "float32", "int4", "model_q4"),
        ("int4", "float16", "int4-fp16", "model_q4f16"),
        ("int8", "bfloat16", "int8-bf16", "model_q8bf16"),
        ("mixed", "bfloat16", "mixed-bf16", "model_mixed_bf16"),
        ("keep", "float32", "keep", "model_keep"),
    ],
)
def test_files_have_the_names_of_the_hub(
    dtype: str, activations: DType, variant: str, stem: str
) -> None:
    assert variant_name(dtype, activations) == variant
    assert graph_stem(dtype, activations) == stem


def test_no_two_variants_share_a_file_name() -> None:
    kinds: tuple[DType, ...] = ("float32", "float16", "bfloat16")
    names = {
        variant_name(dtype, kind): graph_stem(dtype, kind)
        for dtype in EXPORT_DTYPES
        for kind in kinds
    }
    assert len(set(names.values())) == len(names)


def test_each_variant_has_files_and_a_proof_of_its_own(several: Path) -> None:
    bundle = Bundle(several)
    assert bundle.variants("onnx") == ("fp32", "int8")
    assert all(graph.verified for graph in bundle.manifest.graphs)
    assert set(read_proofs(several)) == {"onnx/model_quantized.onnx", "onnx/model.onnx"}
    names = ("model", "model_windowed", "model_quantized", "model_quantized_windowed")
    data = ("model.onnx_data", "model_quantized.onnx_data")
    found = {path.name for path in (several / "onnx").iterdir()}
    assert found == {*data, *(f"{name}.onnx" for name in names)}
    for name in names:
        graph = onnx.load(several / "onnx" / f"{name}.onnx", load_external_data=False).graph
        places = {entry.value for t in graph.initializer for entry in t.external_data[:1]}
        assert places == {f"{name.removesuffix('_windowed')}.onnx_data"}, name


def test_the_default_is_the_variant_in_model_onnx_and_is_named(several: Path) -> None:
    result = run_ok("generate", several, *GENERATE)
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert "has the variants fp32, int8; this is fp32 (choose" in note
    chosen = run_ok("generate", several, "--variant", "fp32", *GENERATE)
    tokens = [json.loads(item.stdout)["token_ids"] for item in (result, chosen)]
    assert tokens[0] == tokens[1]
    assert "note:" not in chosen.stderr
    settings = json.loads((several / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["model"]["decoder"]["filename"] == "onnx/model.onnx"


def test_python_opens_a_variant_by_name(several: Path) -> None:
    prompt = [2, 9, 4, 7, 7, 100, 3, 250]
    logits = {}
    for variant in (None, "fp32", "int8"):
        with gemma3_export.load(several, variant=variant) as model:
            assert model.variant == (variant or "fp32")
            cache = model.runtime.new_cache(1, len(prompt))
            logits[variant] = model.runtime.step(np.array([prompt]), cache, num_logits=8)
    assert (logits[None] == logits["fp32"]).all()
    assert (logits["int8"] != logits["fp32"]).any()
    with pytest.raises(InputError, match="no variant 'bf16'; choose one of fp32, int8"):
        gemma3_export.load(several, variant="bf16")


def test_one_command_exports_several_variants(one_layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    dtypes = ("--dtype", "int8", "--dtype", "fp32", "--block-size", 16)
    source = ("--random-weights", 3, "--config", one_layer, "--threads", 1)
    result = run_ok("onnx", *source, *dtypes, "--no-verify", "-o", path)
    assert "int8 and fp32, target ort" in result.stdout
    assert Bundle(path).variants("onnx") == ("int8", "fp32")
    assert Bundle(path).graph("onnx").variant == "fp32"
    again = error_line("onnx", *source, "--dtype", "int8", "--no-verify", "-o", path)
    assert "already has int8 for onnx" in again


@pytest.mark.parametrize(
    "command",
    [
        ("generate", *GENERATE),
        ("chat",),
        ("batch", "in.jsonl", "out.jsonl"),
        ("bench",),
        ("verify",),
        ("inspect",),
    ],
    ids=lambda command: command[0],
)
def test_an_unknown_variant_is_rejected_with_those_that_exist(
    several: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    result = run(name, several, *options, "--variant", "int4")
    assert result.exit_code == 2
    (message,) = result.stderr.splitlines()
    assert message.endswith(f"{several} has no variant 'int4'; choose one of fp32, int8")


def test_verify_checks_all_variants_unless_one_is_chosen(several: Path) -> None:
    result = run_ok("verify", several, "--threads", 1)
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("variant ")] == [
        "variant fp32:",
        "variant int8:",
    ]
    assert sum(line.startswith("PASS") for line in lines) == 2
    one = run_ok("verify", several, "--variant", "int8", "--threads", 1, "--json")
    assert json.loads(one.stdout)["candidate"]["dtype"] == "int8"
    rejected = run("verify", several, "--json")
    assert rejected.exit_code == 2
    assert "choose it with --variant" in rejected.stderr


def test_inspect_describes_all_variants_or_one(several: Path) -> None:
    facts = json.loads(run_ok("inspect", several, "--json").stdout)
    assert [graph["variant"] for graph in facts["graphs"]] == ["fp32", "int8"]
    text = run_ok("inspect", several, "--variant", "int8").stdout
    assert "graph onnx/model_quantized.onnx" in text
    assert "graph onnx/model.onnx" not in text
    assert text.count("proof: passed") == 1


def test_the_files_of_other_variants_may_be_missing(copied: Path) -> None:
    (copied / "onnx" / "model.onnx_data").unlink()
    run_ok("generate", copied, "--variant", "int8", *GENERATE)
    run_ok("inspect", copied, "--variant", "int8", "--check")
    assert "onnx/model.onnx_data: missing" in error_line("generate", copied, *GENERATE)
    assert "onnx/model.onnx_data: missing" in error_line("inspect", copied, "--check")


def test_a_variant_is_added_to_a_bundle_of_the_same_weights(tmp_path: Path) -> None:
    path = shutil.copytree(exported(INT8), tmp_path / "bundle")
    before = contents(path)
    result = export_bundle(source_of(), path, OnnxWriter(), TorchScriptWriter())
    assert [graph.variant for graph in result.graphs] == ["fp32", "fp32"]
    after = contents(path)
    changed = {name for name in before if after[name] != before[name]}
    # The card lists the new graphs, and genai_config.json names the new default.
    assert changed == {"README.md", "manifest.json", "genai_config.json"}
    settings = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["model"]["decoder"]["filename"] == "onnx/model.onnx"
    Bundle(path).check_files()
    assert Bundle(path).graph("onnx").variant == "fp32"
    assert Bundle(path, "int8").runtimes == ("onnx",)
    with pytest.raises(InputError, match="no torchscript graph of variant int8"):
        Bundle(path, "int8").graph("torchscript")


@pytest.mark.parametrize("is_proven", [False, True], ids=["the same variant", "a failed proof"])
def test_a_failed_addition_leaves_the_bundle_as_it_was(is_proven: bool, tmp_path: Path) -> None:
    path = shutil.copytree(exported(INT8), tmp_path / "bundle")
    before = contents(path)

    def fails(folder: Path, source: object, graph: Graph, ranges: object = None) -> str:
        assert (folder / graph.path).is_file()
        raise ParityError("it differs")

    if is_proven:
        with pytest.raises(ParityError):
            export_bundle(source_of(), path, OnnxWriter(), verification=fails)
    else:
        with pytest.raises(InputError, match=r"already has int8 for onnx; .* --force"):
            export_bundle(source_of(), path, OnnxWriter(), INT8)
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_a_variant_that_is_requested_twice_is_rejected(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp32 graph is requested 2 times"):
        gemma3_export.export_onnx(tiny_folder, tmp_path / "out", dtype=("fp32", "fp32"))
    assert not (tmp_path / "out").exists()


def test_bundles_of_format_2_keep_their_proof_and_their_file_names(
    copied: Path, tiny_folder: Path
) -> None:
    """They have one graph per runtime, called model.onnx, and proofs by runtime."""
    manifest = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))
    graph = next(item for item in manifest["graphs"] if item["path"] == "onnx/model.onnx")
    proof = read_proofs(copied)[graph["path"]]
    (copied / "parity.json").write_text(json.dumps({"onnx": proof}), encoding="utf-8")
    del manifest["files"]["parity.json"]
    edit_json(
        copied / "manifest.json",
        format_version=2,
        graphs=[graph | {"dtype": "int8"}],
        files=manifest["files"],
    )
    assert read_proofs(copied) == {"onnx/model.onnx": proof}
    run_ok("generate", copied, *GENERATE)
    assert "proof: passed" in run_ok("inspect", copied).stdout
    with pytest.raises(InputError, match="older version, which put its int8 graph in onnx/model"):
        gemma3_export.export_onnx(tiny_folder, copied, verify=False)
