"""Screened heads: every token that could be among the largest is a candidate."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser

from gemma3_export.bundle import Bundle
from gemma3_export.config import preset
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.screened_head import (
    graph_text,
    row_margins,
    screen_bytes,
    screen_format,
    should_screen,
)
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.parity import VerifyOptions, verify
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.block_matrix import pack_codes, quantize
from gemma3_export.runtimes.generation.candidates import Candidates
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.speculation import PromptLookup
from gemma3_export.runtimes.onnx import decode_steps as screened_steps
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.exported_bundles import accept_changes, exported_bundle, source_of
from tests.support.generation import generate
from tests.support.tiny_models import tiny_config, write_hf_folder

CONFIG = tiny_config(vocab_size=2_500)
ROWS, COLUMNS = CONFIG.vocab_size, CONFIG.hidden_size
GREEDY = SamplingParams()


@functools.cache
def runtime() -> OnnxRuntime:
    return OnnxRuntime(
        exported_bundle("ort", "screened"), device="cpu", threads=1, sliding_window_cache=True
    )


def ids_of(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ROWS, shape)


class Screen:
    """A session of the screening subgraph alone, for a given head."""

    def __init__(self, head: np.ndarray, margins: np.ndarray | None = None) -> None:
        import onnxruntime

        weights = torch.from_numpy(head)
        matrix = quantize(weights, screen_format(CONFIG))
        blocks = (ROWS, COLUMNS // matrix.format.block_size)
        model = parser.parse_model(graph_text(CONFIG))
        for name, array in {
            "head": head,
            "codes": pack_codes(matrix).numpy().reshape(*blocks, -1),
            "scales": matrix.scales.numpy(),
            "margins": row_margins(weights, matrix.dequantize()).numpy()
            if margins is None
            else margins,
        }.items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        del model.graph.input[2:]  # constants, which kernels pack
        for name in ("bottom", "top"):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        self.session = onnxruntime.InferenceSession(model.SerializeToString())

    def __call__(self, hidden: np.ndarray, count: int) -> list[Any]:
        """Return rows, ids and logits of candidates, and the states that need all logits."""
        inputs = {"hidden": hidden, "num_candidates": np.array([count])}
        found: list[Any] = self.session.run(None, inputs)[:4]
        return found

    def reach(self, hidden: np.ndarray) -> list[np.ndarray]:
        """Return the lower and upper bound of each logit, [V]."""
        inputs = {"hidden": hidden, "num_candidates": np.array([1])}
        return [found[0] for found in self.session.run(["bottom", "top"], inputs)]


def random_head(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, (ROWS, COLUMNS)).astype(np.float32)


def states() -> dict[str, np.ndarray]:
    """Return hidden states [1, 1, D] of different kinds."""
    generator = np.random.default_rng(3)
    plain = generator.normal(0, 1, COLUMNS)
    outlier = plain.copy()
    outlier[17] = 60.0  # as in the real model: one element has half of the norm
    sparse = np.where(generator.random(COLUMNS) < 0.1, plain, 0)
    halves = np.round(plain * 127) / 127 + 0.5 / 127  # between two steps of the kernel's grid
    kinds = {"plain": plain, "outlier": outlier, "sparse": sparse, "halves": halves}
    kinds |= {"tiny": plain * 1e-12, "huge": plain * 1e6, "one": np.eye(COLUMNS)[5] * -3}
    return {name: state.astype(np.float32)[None, None] for name, state in kinds.items()}


class TestProof:
    @pytest.mark.parametrize("kind", states())
    def test_every_logit_is_within_its_bounds(self, kind: str) -> None:
        """This processor's kernel rounds to the grid that the proof assumes."""
        head, hidden = random_head(), states()[kind]
        bottom, top = Screen(head).reach(hidden)
        truth = head.astype(np.float64) @ hidden[0, 0].astype(np.float64)
        assert (bottom <= truth).all()
        assert (truth <= top).all()
        lengths = np.linalg.norm(head, axis=1) * np.linalg.norm(hidden)
        assert (top - bottom < 0.02 * lengths).all(), "of use only where it is narrow"

    @pytest.mark.parametrize("count", [1, 7, 40])
    @pytest.mark.parametrize("kind", states())
    def test_no_token_among_the_largest_is_missing(self, kind: str, count: int) -> None:
        head, hidden = random_head(), states()[kind]
        rows, ids, scores, others = Screen(head)(hidden, count)
        truth = head.astype(np.float64) @ hidden[0, 0].astype(np.float64)
        assert others.shape == (1, 0, COLUMNS), "candidates suffice"
        assert set(np.argsort(-truth)[:count]) <= set(ids)
        assert not rows.any()
        size = np.linalg.norm(hidden)
        np.testing.assert_allclose(scores, truth[ids], rtol=1e-5, atol=1e-6 * size)

    def test_the_copy_alone_would_choose_wrongly(self) -> None:
        """Without margins, tokens are missing or in another order."""
        head = random_head()
        blind = Screen(head, margins=np.zeros((2, ROWS), np.float32))
        wrong = 0
        for seed in range(40):
            hidden = np.random.default_rng(seed).normal(0, 1, (1, 1, COLUMNS)).astype(np.float32)
            truth = head.astype(np.float64) @ hidden[0, 0]
            _, ids, _, _ = blind(hidden, 64)
            wrong += not set(np.argsort(-truth)[:64]) <= set(ids)
        assert wrong > 10

    def test_all_tokens_tied_with_the_last_candidate_are_candidates(self) -> None:
        head = random_head()
        hidden = states()["plain"]
        best = int((head @ hidden[0, 0]).argmax())
        head[[3, 999, 2_400]] = head[best]
        _, ids, scores, _ = Screen(head)(hidden, 2)
        assert {3, 999, 2_400, best} <= set(ids)
        assert len(set(scores[np.isin(ids, [3, 999, 2_400, best])])) == 1

    def test_each_row_has_its_own_candidates(self) -> None:
        head, kinds = random_head(), states()
        hidden = np.concatenate([kinds["plain"], kinds["outlier"], kinds["one"]])
        rows, ids, _, _ = Screen(head)(hidden, 5)
        for row, state in enumerate(hidden[:, 0]):
            truth = head.astype(np.float64) @ state
            assert set(np.argsort(-truth)[:5]) <= set(ids[rows == row])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_states_that_are_not_finite_return_all_logits(self, value: float) -> None:
        hidden = states()["plain"].copy()
        hidden[0, 0, 4] = value
        _, ids, _, others = Screen(random_head())(hidden, 1)
        assert ids.size == 0
        np.testing.assert_array_equal(others, hidden)

    def test_a_row_that_is_not_finite_among_others_has_no_candidates(self) -> None:
        hidden = np.repeat(states()["plain"], 2, axis=0)
        hidden[1, 0, 4] = np.nan
        rows, ids, scores, others = Screen(random_head())(hidden, 3)
        assert others.shape[1] == 0
        finite, broken = (
            screened_steps.complete(ids[rows == row], scores[rows == row], 3, ROWS)
            for row in range(2)
        )
        assert isinstance(finite, Candidates)
        assert len(finite.ids) == 3
        assert isinstance(broken, np.ndarray), "the sampler refuses logits that are not finite"
        assert broken.shape == (ROWS,)
        assert np.isnan(broken).all()

    def test_too_many_close_logits_return_all_logits(self) -> None:
        head = np.repeat(random_head()[:1], ROWS, axis=0)
        _, ids, _, others = Screen(head)(states()["plain"], 1)
        assert ids.size == 0
        assert others.shape == (1, 1, COLUMNS)

    def test_without_a_count_nothing_is_screened(self) -> None:
        hidden = np.repeat(states()["plain"], 3, axis=1)
        _, ids, _, others = Screen(random_head())(hidden, 0)
        assert ids.size == 0
        np.testing.assert_array_equal(others, hidden)


class TestRuntime:
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("top_k", [None, 1, 5, 40])
    def test_candidates_are_the_largest_of_all_logits(self, rows: int, top_k: int | None) -> None:
        plain, choosing = (runtime().new_cache(rows, 60) for _ in range(2))
        for cache in (plain, choosing):
            runtime().step(ids_of(rows, 4), cache, num_logits=1)
        for step in range(12):
            ids = ids_of(rows, 1, seed=step)
            logits = runtime().step(ids, plain, num_logits=1)[:, -1]
            params = SamplingParams(top_k=top_k) if top_k else GREEDY
            chosen = runtime().step_candidates(ids, choosing, [params] * rows)
            assert chosen is not None
            for expected, found in zip(logits, chosen, strict=True):
                assert isinstance(found, Candidates), "else the screen is of no use"
                largest = np.argsort(-expected)[: top_k or 1]
                assert found.ids.tolist() == sorted(largest)
                np.testing.assert_allclose(found.scores, expected[found.ids], atol=1e-5)
        np.testing.assert_array_equal(plain.lengths, choosing.lengths)

    @pytest.mark.parametrize(
        "params",
        [
            GREEDY,
            SamplingParams(temperature=0.8, top_k=20, seed=3),
            SamplingParams(temperature=1.0, top_k=64, top_p=0.9, seed=4),
        ],
    )
    @pytest.mark.parametrize("drafter", [None, PromptLookup])
    def test_texts_are_those_of_all_logits(
        self, params: SamplingParams, drafter: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = [np.tile(ids_of(5), 3 + index) for index in range(2)]

        def texts() -> list[list[int]]:
            done = generate(
                runtime(),
                prompts,
                params,
                max_new_tokens=20,
                stop_token_ids=(),
                drafter=drafter,
            ).collect()
            return [completion.token_ids for completion in done]

        screened = texts()
        unscreened = replace(runtime().info, has_screened_head=False)
        monkeypatch.setattr(runtime(), "info", unscreened)
        assert screened == texts()

    def test_sampling_that_needs_all_logits_gets_them(self) -> None:
        cache = runtime().new_cache(1, 8)
        for params in (
            SamplingParams(temperature=1.0),
            SamplingParams(top_p=0.5),
            SamplingParams(logprobs=0),
            SamplingParams(repetition_penalty=1.1),
        ):
            assert runtime().step_candidates(ids_of(1, 1), cache, [params]) is None
        assert cache.lengths.tolist() == [0]

    def test_a_full_cache_is_rejected(self) -> None:
        cache = runtime().new_cache(1, 3)
        runtime().step(ids_of(1, 3), cache, num_logits=1)
        with pytest.raises(InputError, match="no room for 1 more"):
            runtime().step_candidates(ids_of(1, 1), cache, [GREEDY])

    def test_screening_backs_off_when_it_does_not_help(self, tmp_path: Path) -> None:
        weights = write_hf_folder(tmp_path / "flat", CONFIG)
        flat = torch.ones(ROWS, COLUMNS) * 0.01
        flat[:, 0] += torch.randn(ROWS) * 1e-7
        weights["model.embed_tokens.weight"] = flat
        torch.save(weights, tmp_path / "flat.pt")
        source = open_weights(
            str(tmp_path / "flat.pt"), config_path=tmp_path / "flat" / "config.json"
        )
        bundle = export_bundle(source, tmp_path / "bundle", OnnxWriter(screen=True)).path
        flat_runtime = OnnxRuntime(bundle, device="cpu", threads=1, sliding_window_cache=True)
        plain, choosing = (flat_runtime.new_cache(1, 200) for _ in range(2))
        screened = []
        for step in range(60):
            ids = ids_of(1, 1, seed=step)
            logits = flat_runtime.step(ids, plain, num_logits=1)[0, -1]
            chosen = flat_runtime.step_candidates(ids, choosing, [GREEDY])
            if chosen is None:
                flat_runtime.step(ids, choosing, num_logits=1)
                continue
            screened.append(step)
            assert isinstance(chosen[0], np.ndarray)
            np.testing.assert_allclose(chosen[0], logits, atol=1e-5)
        assert screened == [0, 4, 12, 28]

    def test_numbers_that_are_not_finite_are_an_error_as_elsewhere(self, tmp_path: Path) -> None:
        shutil.copytree(exported_bundle("ort", "screened"), tmp_path / "nan")
        data = tmp_path / "nan" / "onnx" / "model.onnx_data"
        graph = onnx.load(tmp_path / "nan" / "onnx" / "model.onnx", load_external_data=False).graph
        norm = next(item for item in graph.initializer if item.name == "model.norm.weight")
        entries = {entry.key: int(entry.value) for entry in norm.external_data[1:]}
        raw = bytearray(data.read_bytes())
        raw[entries["offset"] : entries["offset"] + 4] = np.float32(np.nan).tobytes()
        data.write_bytes(raw)
        accept_changes(tmp_path / "nan")
        damaged = OnnxRuntime(tmp_path / "nan", device="cpu", threads=1, sliding_window_cache=True)
        events = generate(damaged, [ids_of(3)], GREEDY, max_new_tokens=4)
        with pytest.raises(Gemma3ExportError, match="no token can be chosen"):
            events.collect()

    def test_shared_weights_and_unknown_processors_are_not_screened(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = exported_bundle("ort", "screened")
        assert runtime().selects_candidates
        shared = OnnxRuntime(bundle, device="cpu", sliding_window_cache=True, shares_weights=True)
        assert not shared.selects_candidates
        assert shared.step_candidates(ids_of(1, 1), shared.new_cache(1, 4), [GREEDY]) is None
        monkeypatch.setattr(screened_steps.platform, "machine", lambda: "riscv64")
        assert not OnnxRuntime(bundle, device="cpu", sliding_window_cache=True).selects_candidates


class TestParity:
    OPTIONS = VerifyOptions(decode_steps=16, greedy_steps=4)

    def test_verify_takes_steps_with_candidates_too(self) -> None:
        report = verify(runtime(), source_of("screened"), options=self.OPTIONS)
        assert report.passed, report.to_json()
        assert {"candidates-decode", "candidates-ragged-batch"} <= {
            case.name for case in report.cases
        }

    def test_verify_detects_the_copy_of_another_head(self, tmp_path: Path) -> None:
        shutil.copytree(exported_bundle("ort", "screened"), tmp_path / "other")
        data = tmp_path / "other" / "onnx" / "model_windowed.onnx_data"
        raw = np.frombuffer(data.read_bytes(), np.uint8).copy()
        codes = raw[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)
        codes[: ROWS // 2] = codes[ROWS // 2 :].copy()
        data.write_bytes(raw.tobytes())
        accept_changes(tmp_path / "other")
        other = OnnxRuntime(tmp_path / "other", device="cpu", threads=1, sliding_window_cache=True)
        report = verify(other, source_of("screened"), options=self.OPTIONS)
        failed = {case.name for case in report.cases if not case.passed}
        assert failed == {"candidates-decode", "candidates-ragged-batch"}


class TestExport:
    def test_large_heads_are_screened_by_default(self) -> None:
        assert should_screen(preset("270m").config, None)
        assert not should_screen(CONFIG, None)
        assert not should_screen(preset("270m").config, False)
        assert screen_format(preset("270m").config).block_size == 128

    def test_the_file_holds_only_the_copy(self) -> None:
        bundle = Bundle(exported_bundle("ort", "screened"))
        assert bundle.graph("onnx").is_screened
        size = bundle.manifest.files["onnx/model_windowed.onnx_data"].size_bytes
        assert 0 <= size - screen_bytes(CONFIG) < 2 * 4096, "but for alignment"
        assert not Bundle(exported_bundle("ort")).graph("onnx").is_screened

    @pytest.mark.parametrize(
        ("writer", "config", "problem"),
        [
            (OnnxWriter(screen=True, target="portable"), CONFIG, "--target portable"),
            (OnnxWriter(screen=True, dtype="bf16"), CONFIG, "--dtype bf16"),
            (OnnxWriter(screen=True, dtype="int8", block_size=16), CONFIG, "--dtype int8"),
            (
                OnnxWriter(screen=True),
                tiny_config(layer_types=("full_attention",) * 5),
                "layers of type full_attention",
            ),
            (
                OnnxWriter(screen=True),
                tiny_config(hidden_size=40),
                "hidden_size 40 is not a multiple",
            ),
        ],
    )
    def test_heads_that_cannot_be_screened_are_rejected(
        self, writer: OnnxWriter, config: Any, problem: str, tmp_path: Path
    ) -> None:
        write_hf_folder(tmp_path / "weights", config)
        source = open_weights(str(tmp_path / "weights"))
        with pytest.raises(InputError, match=problem):
            export_bundle(source, tmp_path / "out", writer)
        assert not (tmp_path / "out").exists()

    def test_an_older_bundle_has_no_screen(self, tmp_path: Path) -> None:
        shutil.copytree(exported_bundle("ort"), tmp_path / "old")
        manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
        del manifest["graphs"][0]["is_screened"]
        (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
        assert not OnnxRuntime(tmp_path / "old", device="cpu").info.has_screened_head
