"""The model card and the other documents of a bundle: what they say, and who may edit them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import gemma3_export
from gemma3_export.bundle import (
    CARD,
    GIT_ATTRIBUTES,
    NOTICE,
    PLOT,
    BlockFormat,
    Bundle,
    FileRecord,
    Graph,
    Manifest,
    WeightRecipe,
)
from gemma3_export.bundle.inspection import read_proofs
from gemma3_export.bundle.model_card import GEMMA_NOTICE, documents_of, render_card
from gemma3_export.config import Gemma3Config, preset
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import stamp_bundle
from gemma3_export.staging import staged_directory
from tests.support.command_line import run_ok
from tests.support.tiny_models import tiny_config

COMMIT = "9e8d7c6b" * 5
GRAPH = Graph(
    runtime="onnx",
    path="onnx/model.onnx",
    dtype="int8",
    target="ort",
    cache_dtype="float32",
    weights={},
    verified=True,
)
REPORT: dict[str, Any] = {
    "passed": True,
    "noise_floor_dtype": "float32",
    "cases": [
        {
            "positions": 2,
            "metrics": [{"name": "logits_max_abs", "value": 0.0625, "noise_floor": 0.03125}],
            "points": [
                {"kld": 1e-9, "is_same_top1": True},
                {"kld": 1e-9, "is_same_top1": False},
            ],
        }
    ],
    "gates": [
        {
            "name": "quality",
            "metrics": [
                {"name": "mean_kld", "value": 0.004321},
                {"name": "top1_agreement", "value": 0.957},
                {"name": "perplexity_ratio", "value": 1.0123},
            ],
        }
    ],
}


@pytest.fixture
def bundle(ort_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "tiny"))


def manifest(*graphs: Graph, names: tuple[str, ...] = (), **source: Any) -> Manifest:
    files = {path: FileRecord(sha256="0" * 64, size_bytes=3_000_000) for path in names}
    files |= {graph.path: FileRecord(sha256="0" * 64, size_bytes=500_000) for graph in graphs}
    origin = {"kind": "safetensors", "location": "weights", "files": {}} | source
    return Manifest(graphs=[*graphs], source=origin, versions={"torch": "2.13.0"}, files=files)


def card(config: Gemma3Config, described: Manifest, **options: Any) -> str:
    reports = {graph.path: REPORT for graph in described.graphs}
    return render_card(config, described, reports, **options)


class TestDocumentsOfAnExport:
    def test_they_are_in_the_folder_and_in_the_manifest(self, ort_bundle: Path) -> None:
        found = Bundle(ort_bundle)
        assert {CARD, GIT_ATTRIBUTES, PLOT} <= set(found.manifest.files)
        assert NOTICE not in found.manifest.files, "these weights are not Gemma's"
        found.check_files()
        assert not found.is_edited(CARD)
        text = (ort_bundle / CARD).read_text(encoding="utf-8")
        assert "| `onnx/model.onnx` | ONNX Runtime | fp32 | float32 |" in text
        assert re.search(r"\| `onnx/model.onnx` \| \d+ \| (\d+) \| \S+ \| [\d.]+ \(float32\)", text)
        assert "onnx/model.onnx_data" not in text
        assert "*.onnx_data filter=lfs" in (ort_bundle / GIT_ATTRIBUTES).read_text("utf-8")

    def test_the_example_with_onnxruntime_alone_gives_the_same_tokens(
        self, ort_bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = (ort_bundle / CARD).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        (code,) = (block for block in blocks if "import onnxruntime\n" in block)
        scope: dict[str, Any] = {}
        code = code.replace('folder = "."', f"folder = {str(ort_bundle)!r}")
        exec(compile(code, CARD, "exec"), scope)
        expected = gemma3_export.load(ort_bundle).generate("The sea is", max_new_tokens=20)
        assert scope["new"] == [token.token_id for token in expected.tokens]
        assert capsys.readouterr().out.strip()

    def test_editing_or_deleting_them_does_not_damage_the_bundle(self, bundle: Path) -> None:
        (bundle / CARD).write_text("mine")
        (bundle / GIT_ATTRIBUTES).unlink()
        found = Bundle(bundle)
        found.check_files()
        assert found.is_edited(CARD)
        assert not found.is_edited(GIT_ATTRIBUTES)
        run_ok("inspect", bundle, "--check")
        gemma3_export.load(bundle, check=True)

    def test_an_edited_card_survives_a_new_proof_and_others_are_written_again(
        self, bundle: Path
    ) -> None:
        (bundle / CARD).write_text("mine")
        (bundle / GIT_ATTRIBUTES).unlink()
        found = Bundle(bundle)
        proof = json.dumps(read_proofs(bundle)["onnx/model.onnx"] | REPORT)
        stamp_bundle(found, found.graph("onnx"), proof)
        assert (bundle / CARD).read_text() == "mine"
        assert (bundle / GIT_ATTRIBUTES).is_file()
        assert Bundle(bundle).is_edited(CARD), "and it is known that it was edited"

        (bundle / CARD).unlink()
        found = Bundle(bundle)
        stamp_bundle(found, found.graph("onnx"), proof)
        assert "| 1 | 2 | 0.062 |" in (bundle / CARD).read_text(encoding="utf-8")
        assert not Bundle(bundle).is_edited(CARD)
        stamp_bundle(Bundle(bundle), found.graph("onnx"), proof)
        assert not Bundle(bundle).is_edited(CARD)

    def test_force_does_not_replace_an_edited_card(self, bundle: Path) -> None:
        (bundle / CARD).write_text("mine")
        with (
            pytest.raises(InputError, match=r"was edited \(it contains README.md\)"),
            staged_directory(bundle, force=True),
        ):
            pass
        assert (bundle / CARD).read_text() == "mine"
        (bundle / CARD).unlink()
        with staged_directory(bundle, force=True) as folder:
            (folder / "new").touch()
        assert [path.name for path in bundle.iterdir()] == ["new"]


class TestLicenseAndBaseModel:
    def test_weights_from_the_hub(self) -> None:
        described = manifest(GRAPH, location=f"google/gemma-3-270m@{COMMIT}")
        config = preset("270m").config
        data = ModelCard(card(config, described)).data
        assert data.license == "gemma"
        assert data.base_model == "google/gemma-3-270m"
        assert data["base_model_relation"] == "quantized"
        documents = documents_of(config, described, {})
        assert documents[NOTICE] == f"{GEMMA_NOTICE}\n"
        assert f"{GEMMA_NOTICE}." in documents[CARD]
        assert "https://ai.google.dev/gemma/prohibited_use_policy" in documents[CARD]

    def test_weights_of_gemma_that_do_not_name_their_repository(self) -> None:
        described = manifest(GRAPH, kind="gguf", location="model-q8.gguf")
        text = card(preset("1b-it").config, described)
        assert ModelCard(text).data.license == "gemma"
        assert ModelCard(text).data.base_model == "google/gemma-3-1b-it"
        assert "the weights do not name their repository" in text

    def test_a_fine_tune(self) -> None:
        described = manifest(
            GRAPH, location=f"google/gemma-3-1b-it@{COMMIT}", adapter={"location": "me/lora@1"}
        )
        text = card(preset("1b-it").config, described)
        assert ModelCard(text).data["base_model_relation"] == "finetune"
        assert "- Merged LoRA adapter: `me/lora@1`\n" in text

    @pytest.mark.parametrize("kind", ["random", "safetensors"])
    def test_weights_that_are_not_known_to_be_gemmas(self, kind: str) -> None:
        config = preset("270m").config if kind == "random" else tiny_config()
        described = manifest(GRAPH, kind=kind)
        assert set(documents_of(config, described, {})) == {CARD, GIT_ATTRIBUTES}
        text = card(config, described)
        assert ModelCard(text).data.license is None
        assert "Terms" not in text
        assert "Base model" not in text


class TestWhatTheCardSays:
    def test_quantized_weights_have_their_distance_from_full_precision(self) -> None:
        text = card(tiny_config(), manifest(GRAPH))
        assert "| `onnx/model.onnx` | 1 | 2 | 0.062 | 2.00 (float32) | 1 / 2 |" in text
        assert "| `onnx/model.onnx` | 0.00432 | 95.7% | 1.012 |" in text
        full = card(tiny_config(), manifest(replace(GRAPH, dtype="fp32")))
        assert "perplexity" not in full

    def test_all_graphs_are_listed_whatever_their_number(self) -> None:
        graphs = (
            GRAPH,
            replace(GRAPH, path="onnx/model_q4f16.onnx", dtype="int4", cache_dtype="float16"),
            replace(GRAPH, runtime="torchscript", path="torchscript/model.ts", verified=False),
        )
        text = card(tiny_config(), manifest(*graphs, names=("onnx/model.onnx_data",)))
        assert "exported as ONNX and TorchScript" in text
        assert "| `onnx/model.onnx` | ONNX Runtime | int8 | float32 | 3.5 MB | proven |" in text
        assert "| ONNX Runtime | int4-fp16 | float16 | 0.5 MB | proven |" in text
        assert "| PyTorch and libtorch | int8 | float32 | 0.5 MB | **not checked** |" in text
        assert "Pad batches for `onnx/model_q4f16.onnx` on the right." in text
        assert "**For the others, nothing proves" in text
        assert re.findall("gemma3-export verify (.*)", text) == [
            ".",  # all variants
            ". --runtime torchscript",
        ]

    def test_consumers_are_those_that_can_run_the_bundle(self) -> None:
        names = ("tokenizer.json", "genai_config.json")
        described = manifest(replace(GRAPH, dtype="fp32"), names=names)
        everything = card(tiny_config(), described, repo_id="me/tiny")
        headings = re.findall("^### (.*)$", everything, flags=re.MULTILINE)
        assert headings == [
            "gemma3-export",
            "onnxruntime alone",
            "optimum-onnx",
            "onnxruntime-genai",
            "transformers.js",
        ]
        assert '"me/tiny", { dtype: "fp32", use_external_data_format: true });' in everything
        web = replace(GRAPH, path="onnx/model_quantized.onnx", target="web")
        text = card(tiny_config(), manifest(web, names=names[:1]), repo_id="me/tiny")
        headings = re.findall("^### (.*)$", text, flags=re.MULTILINE)
        assert headings == ["gemma3-export", "transformers.js"]
        assert '"me/tiny", { dtype: "q8" });' in text
        assert ModelCard(text).data["library_name"] == "transformers.js"
        half = card(tiny_config(), manifest(replace(GRAPH, cache_dtype="bfloat16"), names=names))
        headings = re.findall("^### (.*)$", half, flags=re.MULTILINE)
        assert headings == ["gemma3-export", "onnxruntime-genai"]
        archive = replace(
            GRAPH, runtime="torchscript", path="torchscript/model_quantized.ts", target="torch"
        )
        text = card(tiny_config(), manifest(archive, names=("tokenizer.json",)))
        headings = re.findall("^### (.*)$", text, flags=re.MULTILINE)
        assert headings == ["gemma3-export", "TorchScript"]
        assert 'load(".", runtime="torchscript")' in text
        assert "gemma3-export chat . --runtime torchscript\n" in text
        assert "open `torchscript/model_quantized.ts`." in text
        assert ModelCard(text).data["library_name"] is None

    def test_a_program_for_signed_weights_sets_the_option_that_makes_products_exact(self) -> None:
        blocks = BlockFormat.rotated_rows(64)
        recipe = WeightRecipe(names=("model.norm.weight",), transposed=True, blocks=blocks)
        for weights, is_set in (({"head": recipe}, True), ({}, False)):
            graph = replace(GRAPH, dtype="w8a8", weights=weights)
            text = card(tiny_config(), manifest(graph, names=("tokenizer.json",)))
            entry = 'add_session_config_entry("session.x64quantprecision", "1")'
            assert (entry in text) is is_set
            assert ('model.onnx", options)' in text) is is_set
            assert ("### optimum-onnx" in text) is not is_set

    def test_names_from_outside_cannot_write_markdown_or_yaml(self) -> None:
        described = manifest(GRAPH, location="x`\n# Owned\n[a](http://b) | <c>")
        text = card(tiny_config(), described)
        assert "\n# Owned" not in text
        assert "\n# x\\` \\# Owned \\[a\\](http://b) \\| \\<c\\> as ONNX\n" in text
        assert "- Weights: `x # Owned [a](http://b) | <c>` (safetensors)\n" in text
        assert ModelCard(text).data.pipeline_tag == "text-generation"

    def test_numbers_are_those_of_the_report(self, ort_bundle: Path) -> None:
        report = json.loads((ort_bundle / "parity.json").read_text(encoding="utf-8"))
        (data,) = report.values()
        errors = [
            metric["value"]
            for case in data["cases"]
            for metric in case["metrics"]
            if metric["name"] == "logits_max_abs"
        ]
        text = (ort_bundle / CARD).read_text(encoding="utf-8")
        positions = sum(case["positions"] for case in data["cases"])
        assert f"| {len(data['cases'])} | {positions} | {max(errors):.2g} |" in text
