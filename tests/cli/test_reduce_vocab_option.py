"""``--reduce-vocab``: the same logits for kept tokens, in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gemma3_export
from gemma3_export.bundle import Bundle
from gemma3_export.config import EMBEDDING, HEAD
from gemma3_export.errors import InputError
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.weights import open_weights
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.reduced_vocabulary import ReducedSource, reduce_vocabulary
from gemma3_export.tokenizer import load_tokenizer
from tests.support.command_line import error_line, run, run_ok
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

TEXT = "the rest of the sea is near\nand the air is in it"
VOCAB_SIZE = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of one layer with 900 tokens, and the corpus next to it."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    layers = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    config = tiny_config(vocab_size=VOCAB_SIZE, eos_token_id=(1, 106, 500), **layers)
    write_hf_folder(folder, config)
    tiny_gemma_tokenizer(VOCAB_SIZE).save(folder)
    (folder.parent / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return folder.parent / "corpus.txt"


def reduced(folder: Path, corpus: Path) -> ReducedSource:
    return reduce_vocabulary(open_weights(str(folder)), corpus)


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_of_kept_tokens_are_those_of_the_full_model(
    folder: Path, corpus: Path, tmp_path: Path, is_tied: bool
) -> None:
    if not is_tied:
        config = open_weights(str(folder)).config
        untied = tiny_config(**{**_fields(config), "tie_word_embeddings": False})
        write_hf_folder(tmp_path, untied)
        tiny_gemma_tokenizer(VOCAB_SIZE).save(tmp_path)
        folder = tmp_path
    with open_weights(str(folder)) as full, reduced(folder, corpus) as source:
        kept = torch.tensor(source.reduction.kept_ids)
        assert len(kept) == source.config.vocab_size < VOCAB_SIZE // 2
        assert source.saved_parameters == (VOCAB_SIZE - len(kept)) * 48 * (2 - is_tied)
        for name in (EMBEDDING,) if is_tied else (EMBEDDING, HEAD):
            assert torch.equal(source.read(name), full.read(name)[kept])
            assert torch.equal(source.read(name, 7, 31), full.read(name)[kept][7:31])
        ids = load_tokenizer(folder).encode(TEXT)
        new_ids = source.tokenizer.encode(TEXT)
        assert new_ids == source.reduction.new_ids(ids)
        expected = load_reference(full)(torch.tensor([ids])).logits[..., kept]
        logits = load_reference(source)(torch.tensor([new_ids])).logits
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        assert source.config.eos_token_id == (1, 106, source.reduction.new_ids([500])[0])
        assert source.config.eos_token_id[2] != 500


def _fields(config: object) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_token_ids_of_the_generation_config_are_renumbered(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.3, "suppress_tokens": [500, 899], "top_k": 7}))
    with reduced(tmp_path / "model", corpus) as source:
        assert source.generation_config() == {
            "temperature": 0.3,
            "suppress_tokens": source.reduction.new_ids([500]),
            "top_k": 7,
        }
        file.write_text(json.dumps({"bad_words_ids": [[500]]}))
        with pytest.raises(InputError, match="bad_words_ids"):
            source.generation_config()


def test_sparse_rows_are_read_in_short_spans(
    folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reduced(folder, corpus) as source:
        whole = source.read(EMBEDDING)
        monkeypatch.setattr("gemma3_export.reference.weights.reduced_vocabulary.SPAN_ROWS", 5)
        asked = []
        read = source.base.read
        monkeypatch.setattr(
            source.base,
            "read",
            lambda name, start, stop: asked.append(stop - start) or read(name, start, stop),
        )
        assert torch.equal(source.read(EMBEDDING), whole)
        assert max(asked) <= 5


@pytest.mark.parametrize(
    "command", ["onnx", "torchscript", pytest.param("pt2", marks=pytest.mark.slow)]
)
def test_every_format_is_proven_with_the_reduced_vocabulary(
    folder: Path, corpus: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    options = ("--reduce-vocab", corpus, "-o", out, "--threads", 1)
    done = run_ok(command, "--weights", folder, *options)
    assert "parity: passed" in done.stdout
    with reduced(folder, corpus) as source:
        kept = source.config.vocab_size
        assert f"vocabulary: {kept} of {VOCAB_SIZE} tokens (corpus.txt); saves" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("next: ")
        bundle = Bundle(out)
        assert bundle.config == source.config
        assert bundle.manifest.source == source.fingerprint()
        assert bundle.manifest.source["reduced_vocabulary"]["of"] == VOCAB_SIZE
        with gemma3_export.load(out, device="cpu", runtime=command) as model:
            ids = source.tokenizer.encode(TEXT)
            logits = model.logits(ids)
            expected = load_reference(source)(torch.tensor([ids])).logits
            np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    if command == "torchscript":  # the fastest
        run_ok("verify", out, "--runtime", command, "--threads", 1)


def test_blocks_of_a_gguf_file_are_kept_for_kept_tokens(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        layer_types=("full_attention",),
    )
    write_gguf(tmp_path / "model.gguf", config, tiny_weights(config), "Q8_0")
    out = tmp_path / "out"
    options = ("--reduce-vocab", corpus, "--tokenizer", folder, "-o", out, "--threads", 1)
    done = run_ok("onnx", "--weights", tmp_path / "model.gguf", "--dtype", "keep", *options)
    assert "parity: passed" in done.stdout
    with open_weights(str(tmp_path / "model.gguf")) as full:
        source = reduce_vocabulary(full, corpus, load_tokenizer(folder))
        kept = torch.tensor(source.reduction.kept_ids)
        stored = open_bundle_weights(Bundle(out))
        assert torch.equal(stored.read(EMBEDDING), full.read(EMBEDDING)[kept])


def test_to_hf_writes_a_model_and_a_tokenizer_that_agree(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    done = run_ok("to-hf", "--weights", folder, "--reduce-vocab", corpus, "-o", out)
    assert "tokens (corpus.txt); saves" in done.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    with reduced(folder, corpus) as source:
        ids = tokenizer(TEXT)["input_ids"]
        assert ids == source.tokenizer.encode(TEXT)
        assert len(tokenizer) == model.config.vocab_size == source.config.vocab_size
        assert model.generation_config.eos_token_id == list(source.config.eos_token_id)
        expected = load_reference(source)(torch.tensor([ids])).logits
        torch.testing.assert_close(
            model(torch.tensor([ids])).logits, expected, rtol=2e-5, atol=2e-5
        )


def test_python_takes_languages(folder: Path, tmp_path: Path) -> None:
    options = {"verify": False, "threads": 1, "reduce_vocab": "en"}
    done = gemma3_export.export_torchscript(folder, tmp_path / "out", **options)
    assert Bundle(done.path).manifest.source["reduced_vocabulary"]["by"] == "en"


def test_a_model_without_a_tokenizer_is_rejected(corpus: Path, tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "model", tiny_config())
    out = tmp_path / "out"
    options = ("--weights", tmp_path / "model", "--reduce-vocab", corpus, "-o", out)
    assert "has no tokenizer" in error_line("onnx", *options)
    assert not out.exists()


def test_verify_finds_the_kept_tokens_in_the_full_weights(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    out, other = tmp_path / "out", tmp_path / "other"
    options = ("--reduce-vocab", corpus, "--no-verify", "--threads", 1)
    run_ok("torchscript", "--weights", folder, *options, "-o", out)
    check = ("verify", out, "--runtime", "torchscript", "--threads", 1)
    assert "PASS" in run_ok(*check, "--weights", folder).stdout
    # The full model is no baseline, and says what to do instead of comparing other tokens.
    assert "to-hf --reduce-vocab" in error_line(*check, "--against", folder)
    # One weight of a kept token differs.
    shutil.copytree(folder, other)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with reduced(folder, corpus) as source, torch.no_grad():
        model.model.embed_tokens.weight[source.reduction.kept_ids[-1], 5] += 0.01
    model.save_pretrained(other)
    assert run(*check, "--weights", other).exit_code == 1
    # Tokens of other texts are other rows.
    tiny_gemma_tokenizer(460).save(other)
    assert "the vocabulary of the bundle is not" in error_line(*check, "--weights", other)


def test_quality_of_a_quantized_reduced_bundle_is_measured_against_the_full_weights(
    corpus: Path, tmp_path: Path
) -> None:
    widths = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    layers = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    weights, out = tmp_path / "model", tmp_path / "out"
    write_hf_folder(weights, tiny_config(vocab_size=VOCAB_SIZE, **widths, **layers))
    tiny_gemma_tokenizer(VOCAB_SIZE).save(weights)
    options = ("--dtype", "int8", "--block-size", 32, "--max-kld", 5, "--no-verify", "--threads", 1)
    run_ok("torchscript", "--weights", weights, "--reduce-vocab", corpus, *options, "-o", out)
    check = ("verify", out, "--runtime", "torchscript", "--threads", 1)
    done = run_ok(*check, "--weights", weights)
    assert "mean_kld" in done.stdout
    write_hf_folder(tmp_path / "other", tiny_config(vocab_size=VOCAB_SIZE - 7, **widths, **layers))
    assert "has no tokenizer" in error_line(*check, "--weights", tmp_path / "other")


def test_the_tokenizer_option_names_rows_that_the_weights_tokenizer_does_not(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    weights, more, out = tmp_path / "model", tmp_path / "more", tmp_path / "out"
    shutil.copytree(folder, weights)
    tiny_gemma_tokenizer(VOCAB_SIZE - 20).save(weights)
    tiny_gemma_tokenizer(VOCAB_SIZE - 2).save(more)
    options = ("--tokenizer", more, "--reduce-vocab", corpus, "-o", out)
    run_ok("to-hf", "--weights", weights, *options)
    with open_weights(str(weights)) as full, open_weights(str(out)) as written:
        full.keep_rows(VOCAB_SIZE - 2)
        kept = reduce_vocabulary(full, corpus, load_tokenizer(more)).reduction.kept_ids
        assert torch.equal(written.read(EMBEDDING), full.read(EMBEDDING)[torch.tensor(kept)])


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_corpus_of_json_is_its_strings_without_escapes(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    text = 'the sea\nis \u00e9 "near"'
    rows = {"messages": [{"role": "user", "content": text}], "n": 1}
    corpus = tmp_path / f"chat{suffix}"
    corpus.write_text(json.dumps(rows) + "\n")  # with escapes
    with open_weights(str(folder)) as full, reduced(folder, corpus) as source:
        tokenizer = load_tokenizer(full.tokenizer_file())
        ids = tokenizer.encode(text)
        assert source.reduction.new_ids(ids) == source.tokenizer.encode(text)
    corpus.write_text("{\n")
    assert f"chat{suffix}:1 is not valid JSON" in error_line(
        "to-hf", "--weights", folder, "--reduce-vocab", corpus, "-o", tmp_path / "out"
    )
