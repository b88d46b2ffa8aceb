"""Graphs without this package, fed as Hugging Face's tools do: rows padded on the left."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from gemma3_export.bundle import Bundle, Signature
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import IntArray, Logits
from tests.support.exported_bundles import TARGETS, exported, exported_bundle, source_of
from tests.support.tiny_models import TINY
from tests.support.transformers_peer import transformers_peer

TOLERANCE = 2e-5
STEPS = 8
PAD = 7
LENGTHS = {
    "past the window": (19, 9, 4, 1),
    "within the window": (4, 2),
    "no padding in one of them": (9, 9, 3),
    "one row": (9,),
}


def opened(bundle: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures are expected below
    path = Bundle(bundle).file(Bundle(bundle).graph("onnx").path)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def empty_past(rows: int) -> dict[str, np.ndarray]:
    shape = (rows, TINY.num_key_value_heads, 0, TINY.head_dim)
    return {spec.name: np.zeros(shape, np.float32) for spec in Signature.of(TINY).past}


def random_rows(lengths: tuple[int, ...]) -> list[IntArray]:
    random = np.random.default_rng(5)
    return [random.integers(1, TINY.vocab_size, size + STEPS, np.int64) for size in lengths]


def padded(
    rows: list[IntArray], lengths: tuple[int, ...], side: str, extra: int = 0
) -> tuple[IntArray, IntArray]:
    """Return tokens and mask of all prompts; ``extra`` columns of padding more than needed."""
    columns = max(lengths) + extra
    ids, mask = np.full((len(rows), columns), PAD), np.zeros((len(rows), columns), np.int64)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(columns - length, columns) if side == "left" else slice(0, length)
        ids[index, place] = row[:length]
        mask[index, place] = 1
    return ids, mask


def decode(
    session: ort.InferenceSession,
    rows: list[IntArray],
    lengths: tuple[int, ...],
    side: str,
    extra: int,
) -> list[Logits]:
    """Return every row's logits [length + steps, V], from a prompt and steps of one token."""
    ids, mask = padded(rows, lengths, side, extra)
    past = empty_past(len(rows))
    logits: list[list[Logits]] = [[] for _ in rows]
    for step in range(STEPS + 1):
        feeds = {"input_ids": ids, "attention_mask": mask, **past}
        found, *present = session.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        for index, new in enumerate(logits):
            new.append(
                found[index, mask[index, -ids.shape[1] :] != 0] if step == 0 else found[index]
            )
        if step < STEPS:
            ids = np.array([[row[n + step]] for row, n in zip(rows, lengths, strict=True)])
            mask = np.concatenate((mask, np.ones((len(rows), 1), np.int64)), axis=1)
    return [np.concatenate(new) for new in logits]


@functools.cache
def peer() -> torch.nn.Module:
    source = source_of()
    weights = {name: source.read(name) for name, _ in TINY.weight_shapes()}
    return transformers_peer(TINY, weights).eval()


def expected_by_transformers(row: IntArray) -> Logits:
    with torch.no_grad():
        logits: Logits = peer()(torch.from_numpy(row)[None]).logits[0].numpy()
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_a_padded_batch_equal_each_row_alone_in_transformers(
    target: str, case: str, side: str
) -> None:
    lengths = LENGTHS[case]
    rows = random_rows(lengths)
    session = opened(exported_bundle(target))
    for extra in (0, 3):
        found = decode(session, rows, lengths, side, extra)
        for row, logits in zip(rows, found, strict=True):
            expected = expected_by_transformers(row)
            np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_a_left_padded_batch_generates_what_transformers_generates() -> None:
    lengths = LENGTHS["past the window"]
    ids, mask = padded(random_rows(lengths), lengths, "left")
    expected = peer().generate(  # type: ignore[operator]
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=None,
    )[:, ids.shape[1] :]
    session, past, found = opened(exported_bundle("ort")), empty_past(len(ids)), []
    for _ in range(STEPS):
        feeds = {"input_ids": ids, "attention_mask": mask, "num_logits_to_keep": np.array([1])}
        logits, *present = session.run(None, feeds | past)
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
        found.append(ids)
    assert np.concatenate(found, axis=1).tolist() == expected.tolist()


def test_quantized_graphs_take_padding_on_either_side() -> None:
    """Compare with rows alone in the same graph: transformers has no such rounding."""
    session = opened(exported(OnnxWriter(dtype="int8", block_size=16, max_kld=1.0)))
    lengths = LENGTHS["past the window"]
    rows = random_rows(lengths)
    alone = [decode(session, [r], (n,), "left", 0)[0] for r, n in zip(rows, lengths, strict=True)]
    for side in ("left", "right"):
        found = decode(session, rows, lengths, side, 2)
        for logits, expected in zip(found, alone, strict=True):
            np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("past", "new", "mask"),
    [
        (0, 5, [0, 1, 1, 0, 1]),  # a gap between tokens
        (0, 5, [0, 1, 1, 0, 0]),  # padding on both sides
        (3, 2, [0, 0, 0, 0, 1]),  # no token at all in the first step
    ],
)
def test_padding_that_the_fused_graph_cannot_rotate_makes_it_fail(
    past: int, new: int, mask: list[int]
) -> None:
    width = ((0, 0), (0, 0), (0, past), (0, 0))
    cache = {name: np.pad(value, width) for name, value in empty_past(1).items()}
    feeds = {"input_ids": np.full((1, new), 3), "attention_mask": np.array([mask]), **cache}
    with pytest.raises(Exception, match="padding_must_come_before_all_tokens_of_a_row"):
        opened(exported_bundle("ort")).run(None, feeds)


@pytest.mark.parametrize(
    ("writer", "context"),
    [
        (OnnxWriter(dtype="fp16"), TINY.max_position_embeddings),
        (OnnxWriter(dtype="bf16"), TINY.max_position_embeddings),
        (OnnxWriter(dtype="bf16"), 32768),  # rotary tables are computed in the graph
        (
            OnnxWriter(dtype="int8", activations="bf16", block_size=16, max_kld=1.0),
            TINY.max_position_embeddings,
        ),
    ],
    ids=["fp16", "bf16", "bf16 with a long context", "int8 with bf16 activations"],
)
def test_in_half_precision_a_row_padded_on_the_left_gets_nan_and_no_other_row_does(
    writer: OnnxWriter, context: int
) -> None:
    bundle = exported(writer, replace(TINY, max_position_embeddings=context))
    runtime = OnnxRuntime(bundle, device="cpu", sliding_window_cache=False)
    lengths = LENGTHS["no padding in one of them"]
    ids, mask = padded(random_rows(lengths), lengths, "left")
    logits, _ = runtime.run_padded(ids, mask)
    assert np.isnan(logits).all(axis=(1, 2)).tolist() == [False, False, True]
    expected, _ = runtime.run_padded(ids[:2], mask[:2])
    np.testing.assert_array_equal(logits[:2], expected)
    assert np.isfinite(expected).all()


def test_the_graph_of_our_own_runtime_and_graphs_in_half_precision_rotate_nothing() -> None:
    """The first never sees padding on the left; in the second, each node is a kernel on CUDA."""
    half = exported(OnnxWriter(dtype="bf16")) / "onnx"
    full = exported_bundle("ort") / "onnx"
    for path, rotates in (
        (full / "model.onnx", True),
        (full / "model_windowed.onnx", False),
        (half / "model_bf16.onnx", False),
    ):
        graph = onnx.load(path, load_external_data=False).graph
        names = [item.name for item in (*graph.node, *graph.initializer)]
        assert any(name.startswith("left_padding.rotate") for name in names) == rotates, path
        assert any(node.op_type == "GatherND" for node in graph.node) == rotates, path
