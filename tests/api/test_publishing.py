"""Push bundles to a local server that speaks the protocol of the Hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, snapshot_download

import gemma3_export
from gemma3_export.api.publishing import PushOptions, push_to_hub
from gemma3_export.bundle import CARD, GIT_ATTRIBUTES, MANIFEST, Bundle
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from tests.support.command_line import REPOSITORY, error_line, run_ok
from tests.support.exported_bundles import accept_changes, edit_json
from tests.support.hub_server import ATTRIBUTES, TOKEN, Hub, constants, served

REPO = "me/tiny-onnx"
# The client passes data to its HTTP library in a way that the library wants to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with served(monkeypatch, tmp_path) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def bundle(ort_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pushed(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return hub.repositories[REPO].files(branch)


def test_the_repository_is_a_bundle(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    before = contents(bundle)
    result = push_to_hub(bundle, REPO, commit_message="Second try")
    assert contents(bundle) == before, "nothing in the folder changes"
    rewritten = {CARD, GIT_ATTRIBUTES, MANIFEST}
    found = pushed(hub)
    assert set(found) == set(before) == set(result.files)
    assert {k: v for k, v in found.items() if k not in rewritten} == {
        k: v for k, v in before.items() if k not in rewritten
    }
    assert {name: len(data) for name, data in found.items()} == result.files
    repository = hub.repositories[REPO]
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= repository.in_lfs
    assert not {CARD, "config.json"} & repository.in_lfs
    assert repository.messages == ["Second try"]
    assert not repository.private
    assert result.commit == repository.branches["main"]
    assert result.url == f"{hub.endpoint}/{REPO}/commit/{result.commit}"

    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    downloaded = Bundle(copy)
    downloaded.check_files()
    assert not any(map(downloaded.is_edited, (CARD, "NOTICE")))
    texts = [
        gemma3_export.load(at).generate("The sea", max_new_tokens=5).text for at in (copy, bundle)
    ]
    assert texts[0] == texts[1]


def test_the_card_is_for_the_repository(hub: Hub, bundle: Path) -> None:
    push_to_hub(bundle, REPO)
    text = pushed(hub)[CARD].decode()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-generation"
    assert card.data["library_name"] == "onnx"
    assert {"gemma3-export", "onnx", "fp32"} <= set(card.data.tags)
    assert "\n# me/tiny-onnx\n" in text
    assert "hf download me/tiny-onnx --local-dir tiny-onnx\n" in text
    assert 'pipeline("text-generation", "me/tiny-onnx"' in text
    assert 'og.Model("tiny-onnx")' in text
    assert "](parity.svg)" in text
    assert b"<svg" in pushed(hub)["parity.svg"]


def test_a_private_repository_and_a_branch(hub: Hub, bundle: Path) -> None:
    push_to_hub(bundle, REPO, private=True, revision="int8")
    assert hub.repositories[REPO].private
    assert pushed(hub) == {GIT_ATTRIBUTES: ATTRIBUTES}
    assert MANIFEST in pushed(hub, "int8")
    push_to_hub(bundle, REPO, PushOptions(private=True))
    assert MANIFEST in pushed(hub)


def test_nothing_is_uploaded_to_a_public_repository_with_private(hub: Hub, bundle: Path) -> None:
    push_to_hub(bundle, REPO)
    before = hub.repositories[REPO].branches.copy()
    (bundle / CARD).write_text("secret")
    with pytest.raises(InputError, match=r"me/tiny-onnx exists and is public.*--private"):
        push_to_hub(bundle, REPO, private=True)
    assert hub.repositories[REPO].branches == before


def test_a_damaged_bundle_is_not_pushed(hub: Hub, bundle: Path) -> None:
    with (bundle / "onnx/model.onnx_data").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x55\xaa")
    with pytest.raises(
        InputError, match=r"differs from its manifest: onnx/model.onnx_data: SHA-256"
    ):
        push_to_hub(bundle, REPO)
    assert hub.requests == []


def test_an_unproven_bundle_needs_to_be_allowed(hub: Hub, portable_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"onnx/model.onnx was exported with --no-verify"):
        push_to_hub(portable_bundle, REPO)
    assert hub.requests == []
    push_to_hub(portable_bundle, REPO, allow_unproven=True)
    text = " ".join(pushed(hub)[CARD].decode().split())
    assert "**Nothing proves that this export computes what the model computes:**" in text
    assert "## Parity" not in text
    assert "parity.svg" not in pushed(hub)


def test_an_interrupted_upload_continues(hub: Hub, bundle: Path) -> None:
    hub.puts_left = 1
    with pytest.raises(UnavailableError, match=r"upload of me/tiny-onnx failed.*same command"):
        push_to_hub(bundle, REPO)
    assert pushed(hub) == {GIT_ATTRIBUTES: ATTRIBUTES}, "readers see all files or none"
    (arrived,) = hub.objects
    hub.puts_left = None
    hub.requests.clear()
    push_to_hub(bundle, REPO)
    sent = {path for method, path, _ in hub.requests if method == "PUT"}
    assert sent
    assert f"/lfs/{arrived}" not in sent
    assert pushed(hub)["onnx/model.onnx_data"] == (bundle / "onnx/model.onnx_data").read_bytes()


def test_pushing_again_sends_nothing_twice(hub: Hub, bundle: Path) -> None:
    first = push_to_hub(bundle, REPO)
    hub.requests.clear()
    second = push_to_hub(bundle, REPO)
    assert not [path for method, path, _ in hub.requests if method == "PUT"]
    assert second.files == first.files
    assert second.kept == second.deleted == ()


def test_a_card_edited_in_the_folder_is_uploaded(hub: Hub, bundle: Path) -> None:
    text = "---\nlicense: mit\n---\n\n# Mine\n"
    (bundle / CARD).write_text(text)
    assert push_to_hub(bundle, REPO).is_card_edited
    assert pushed(hub)[CARD].decode() == text
    (bundle / CARD).write_text(text + "More.\n")
    push_to_hub(bundle, REPO)
    assert pushed(hub)[CARD].decode() == text + "More.\n"


def test_a_card_edited_on_the_hub_is_kept(hub: Hub, bundle: Path) -> None:
    push_to_hub(bundle, REPO)
    repository = hub.repositories[REPO]
    repository.edit(CARD, b"# Ours, by hand\n")
    result = push_to_hub(bundle, REPO)
    assert result.kept == (CARD,)
    assert CARD not in result.files
    assert pushed(hub)[CARD] == b"# Ours, by hand\n"


def test_a_card_of_another_program_is_kept(hub: Hub, bundle: Path) -> None:
    push_to_hub(bundle, REPO, revision="other")  # creates the repository
    hub.repositories[REPO].edit(CARD, b"# Fine-tuned\n")
    hub.repositories[REPO].edit("model.safetensors", b"weights")
    assert push_to_hub(bundle, REPO).kept == (CARD,)
    assert pushed(hub)[CARD] == b"# Fine-tuned\n"
    assert pushed(hub)["model.safetensors"] == b"weights"


def test_git_attributes_of_the_repository_are_extended(hub: Hub, bundle: Path) -> None:
    push_to_hub(bundle, REPO)
    lines = pushed(hub)[GIT_ATTRIBUTES].decode().splitlines()
    assert lines[0] == ATTRIBUTES.decode().strip()
    assert "*.onnx_data filter=lfs diff=lfs merge=lfs -text" in lines
    assert len(set(lines)) == len(lines)


def test_files_of_an_earlier_bundle_are_deleted_and_no_others(hub: Hub, bundle: Path) -> None:
    (bundle / "onnx/model_old.onnx").write_bytes(b"old")
    accept_changes(bundle)
    push_to_hub(bundle, REPO)
    hub.repositories[REPO].edit("examples/notes.txt", b"by hand")
    (bundle / "onnx/model_old.onnx").unlink()
    accept_changes(bundle)
    assert push_to_hub(bundle, REPO).deleted == ("onnx/model_old.onnx",)
    assert "onnx/model_old.onnx" not in pushed(hub)
    assert pushed(hub)["examples/notes.txt"] == b"by hand"


def test_files_that_are_not_part_of_the_bundle_stay_at_home(hub: Hub, bundle: Path) -> None:
    (bundle / "token.txt").write_text("hf_secret")
    assert push_to_hub(bundle, REPO).left_out == ("token.txt",)
    assert "token.txt" not in pushed(hub)


def test_what_the_hub_loses_is_noticed(hub: Hub, bundle: Path) -> None:
    hub.drops = "tokenizer_config.json"
    with pytest.raises(Gemma3ExportError, match=r"tokenizer_config.json is missing.*\.gitignore"):
        push_to_hub(bundle, REPO)


def test_no_token(hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    line = error_line("push", bundle, REPO)
    assert "there is no Hub token; set HF_TOKEN or run `hf auth login`" in line
    run_ok("push", bundle, REPO, "--hf-token", TOKEN)


@pytest.mark.parametrize(("owner", "token"), [("others", TOKEN), ("me", "hf_wrong")])
def test_no_permission(
    hub: Hub, bundle: Path, owner: str, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    line = error_line("push", bundle, f"{owner}/tiny")
    assert f"the Hub denies the upload of {owner}/tiny (HTTP 40" in line
    assert "permissions of your token" in line


def test_no_network(hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = error_line("push", bundle, REPO, code=3)
    assert "the upload of me/tiny-onnx failed" in line


def test_a_broken_hub(hub: Hub, bundle: Path) -> None:
    hub.status = 500
    assert "(HTTP 500)" in error_line("push", bundle, REPO, code=3)


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "me/ti ny", "me/-x"])
def test_names_that_are_no_repository(hub: Hub, bundle: Path, repo_id: str) -> None:
    line = error_line("push", bundle, repo_id)
    assert repo_id in line
    assert hub.requests == []


def test_a_dry_run_changes_nothing(hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (bundle / "notes.txt").write_text("mine")
    before = contents(bundle)
    shown = run_ok("push", bundle, REPO, "--dry-run").stdout
    assert hub.requests == []
    assert contents(bundle) == before
    size = (bundle / "onnx/model.onnx_data").stat().st_size
    assert f"{size:>15,}  onnx/model.onnx_data\n" in shown
    assert "left out: notes.txt\n" in shown
    assert f"card: {bundle / CARD}, written for {REPO}\n" in shown
    assert "the license of the weights is unknown" in shown
    assert shown.splitlines()[-1].endswith("nothing was changed (--dry-run)")
    (files,) = [line.split()[2] for line in shown.splitlines() if line.startswith("would upload")]
    assert int(files) == len(push_to_hub(bundle, REPO, token=TOKEN).files)


def test_the_command_says_what_happened(hub: Hub, bundle: Path) -> None:
    edit_json(bundle / "generation_config.json", do_sample=False)
    accept_changes(bundle)
    shown = run_ok("push", bundle, REPO, "--private", "--revision", "v1").stdout
    commit = hub.repositories[REPO].branches["v1"]
    assert shown.splitlines()[-1].startswith(f"{hub.endpoint}/{REPO}/commit/{commit}: ")
    hub.repositories[REPO].edit(CARD, b"by hand", "v1")
    shown = run_ok("push", bundle, REPO, "--revision", "v1", "--commit-message", "Again").stdout
    assert f"edited on the Hub, kept as it is there: {CARD}\n" in shown
    assert hub.repositories[REPO].messages[-1] == "Again"


def test_the_example_in_the_docs_runs(
    hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs/publish.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    exec(compile(code.replace('"gemma-3-270m"', repr(str(bundle))), "publish.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{hub.endpoint}/me/gemma-3-270m-onnx/commit/")
    assert hub.repositories["me/gemma-3-270m-onnx"].private


def test_pushing_needs_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, gemma3_export.api.publishing, gemma3_export.cli.push_command; "
        "sys.exit(bool({'torch', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
