"""Test downloads from a local server that implements the protocol of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.reference.weights import hub as hub_module
from gemma3_export.reference.weights import open_weights
from tests.support.hub_server import COMMIT, TOKEN, Hub, constants, served
from tests.support.tiny_models import tiny_config, write_hf_folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with served(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def weights(hub: Hub, tmp_path: Path) -> dict[str, torch.Tensor]:
    stored = write_hf_folder(tmp_path / "model", tiny_config())
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "README.md").write_text("not needed")
    hub.files = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    hub.files["onnx/model.safetensors"] = b"another format"
    return stored


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
def test_single_file(hub: Hub, weights: dict[str, torch.Tensor], revision: str | None) -> None:
    with open_weights("org/tiny", revision=revision) as source:
        assert all(torch.equal(source.read(name), tensor) for name, tensor in weights.items())
        assert source.config == tiny_config()
        assert source.fingerprint()["location"] == f"org/tiny@{COMMIT}"
        tokenizer = source.tokenizer_file()
    assert tokenizer is not None
    assert tokenizer.name == "tokenizer.json"
    asked = {path for _, path, _ in hub.requests}
    assert not any("README" in path or "onnx" in path for path in asked)
    if revision == "v2":
        assert "/api/models/org/tiny/revision/v2" in asked
    hub.requests.clear()
    open_weights("org/tiny", revision=revision)
    assert not any("/resolve/" in path for _, path, _ in hub.requests), "it was cached"


def write_adapter(folder: Path, base: str, **settings: Any) -> Path:
    """Write a LoRA adapter of rank 1 for the first query projection."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": base}
    name = "model.layers.0.self_attn.q_proj"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": [name]} | settings)
    )
    rows, columns = dict(tiny_config().weight_shapes())[f"{name}.weight"]
    factors = {"A": torch.ones(1, columns), "B": torch.ones(rows, 1)}
    tensors = {f"base_model.model.{name}.lora_{k}.weight": v for k, v in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_base_of_an_adapter(hub: Hub, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = write_adapter(tmp_path / "adapter", "org/tiny", revision="v2")
    with open_weights(adapter=str(adapter)) as source:
        assert torch.equal(source.read(name), weights[name] + 1)
        assert source.fingerprint()["location"] == f"org/tiny@{COMMIT}"
    assert "/api/models/org/tiny/revision/v2" in {path for _, path, _ in hub.requests}


def test_an_adapter_on_the_hub(hub: Hub, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base = str(tmp_path / "model")
    remote = write_adapter(tmp_path / "remote", base)
    hub.files = {p.name: p.read_bytes() for p in remote.iterdir()}
    for source in (
        open_weights("org/tiny", revision="v2"),
        open_weights(adapter="org/tiny@v2"),
        open_weights(base, adapter="org/tiny@v2"),
    ):
        with source:
            assert torch.equal(source.read(name), weights[name] + 1)
            assert source.fingerprint()["adapter"]["location"] == f"org/tiny@{COMMIT}"
    assert "/api/models/org/tiny/revision/v2" in {path for _, path, _ in hub.requests}


def test_an_adapter_beside_a_model_is_not_ignored(
    hub: Hub, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", "org/tiny")
    hub.files |= {p.name: p.read_bytes() for p in adapter.iterdir()}
    with pytest.raises(InputError, match=r"--weights org/tiny --adapter org/tiny to merge"):
        open_weights("org/tiny")
    with open_weights("org/tiny", adapter="org/tiny") as source:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(source.read(name), weights[name] + 1)


def test_shards(hub: Hub, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = list(weights)
    shards = {"model-1-of-2.safetensors": names[:20], "model-2-of-2.safetensors": names[20:]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, tmp_path / shard)
        hub.files[shard] = (tmp_path / shard).read_bytes()
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    del hub.files["model.safetensors"]
    with open_weights("org/tiny") as source:
        assert all(torch.equal(source.read(name), tensor) for name, tensor in weights.items())
        assert sorted(source.fingerprint()["files"]) == sorted(shards)


def test_gated_needs_a_token(hub: Hub, weights: dict[str, torch.Tensor]) -> None:
    hub.gated = True
    with pytest.raises(InputError, match=r"gated.*HF_TOKEN.*hf auth login.*--weights demo"):
        open_weights("org/tiny")
    with open_weights("org/tiny", token=TOKEN) as source:
        assert torch.equal(source.read("model.norm.weight"), weights["model.norm.weight"])
    assert hub.requests[-1][2] == f"Bearer {TOKEN}"


def test_size_alone_selects_the_official_repository(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"google/gemma-3-4b-it was not found.*--weights"):
        open_weights(size="4b-it")
    assert any("google/gemma-3-4b-it" in path for _, path, _ in hub.requests)


def test_missing_repository_and_revision(hub: Hub, weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"org/none was not found.*private"):
        open_weights("org/none")
    with pytest.raises(InputError, match="org/tiny has no revision 'v9'"):
        open_weights("org/tiny", revision="v9")


def test_repository_without_weights(hub: Hub, weights: dict[str, torch.Tensor]) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        open_weights("org/tiny")


def test_truncated_download_is_an_error(hub: Hub, weights: dict[str, torch.Tensor]) -> None:
    hub.truncated = True
    with pytest.raises(UnavailableError, match=r"download of org/tiny failed.*try again"):
        open_weights("org/tiny")
    hub.truncated = False
    with open_weights("org/tiny") as source:
        assert torch.equal(source.read("model.norm.weight"), weights["model.norm.weight"])


@pytest.mark.parametrize(("status", "error"), [(403, InputError), (500, UnavailableError)])
def test_hub_server_errors(hub: Hub, status: int, error: type[Exception]) -> None:
    hub.status = status
    with pytest.raises(error, match="org/tiny"):
        open_weights("org/tiny")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"cannot be reached.*--weights") as caught:
        open_weights("org/tiny")
    assert caught.value.exit_code == 3


def test_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE"):
        open_weights("org/tiny")


def test_chat_templates_are_downloaded_from_their_folder_and_nothing_from_others() -> None:
    wanted = ["config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    others = ["onnx/config.json", "add/model.safetensors", "additional_chat_templates/a.json"]
    found = filter_repo_objects(
        [*wanted, *others],
        allow_patterns=hub_module.PATTERNS,
        ignore_patterns=hub_module.OTHER_FOLDERS,
    )
    assert list(found) == wanted
