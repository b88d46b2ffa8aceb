"""Upload a bundle to the Hugging Face Hub, with its model card, and check what arrived.

    import gemma3_export

    gemma3_export.push_to_hub("gemma-3-270m", "me/gemma-3-270m-onnx", private=True)

The upload is one commit, so readers see the old files or the new ones. After an interruption, the
same call sends only the data files that have not arrived. Needs neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.api.checks import check_callables, check_flags, check_texts
from gemma3_export.api.options import merged
from gemma3_export.bundle import (
    CARD,
    DOCUMENTS,
    GIT_ATTRIBUTES,
    MANIFEST,
    Bundle,
    FileRecord,
    Manifest,
)
from gemma3_export.bundle.inspection import read_proofs
from gemma3_export.bundle.manifest import manifest_to_json
from gemma3_export.bundle.model_card import documents_of, license_of, merge_attributes
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.files import read_bytes
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.records import MAX_JSON_BYTES, to_record
from gemma3_export.staging import foreign_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["PushOptions", "PushResult", "push_to_hub"]

DEFAULT_BRANCH = "main"
MAX_DOCUMENT_BYTES = 2**20
MESSAGE = "Upload a bundle of gemma3-export"


@dataclass(frozen=True, kw_only=True, slots=True)
class PushOptions:
    """Options of :func:`push_to_hub`.

    Args:
        private: create the repository as a private one.
        revision: the branch, which is created if it is missing; None is ``main``.
        commit_message: of the commit.
        token: Hub access token; None is ``HF_TOKEN`` or that of the login.
        allow_unproven: accept graphs without a parity report.
        dry_run: check the bundle and say what would be uploaded, without using the network.
        progress: callback that receives (stage, done, total). During the upload, the Hub's client
            draws bars of its own.
    """

    private: bool = False
    revision: str | None = None
    commit_message: str | None = None
    token: str | None = None
    allow_unproven: bool = False
    dry_run: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_texts(self, "revision", "commit_message", "token")
        check_flags(self, "private", "allow_unproven", "dry_run")
        check_callables(self, "progress")
        for name in ("revision", "commit_message", "token"):
            if getattr(self, name) == "":
                raise InputError(f"{name} is empty; give one, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What was uploaded, or would be.

    Attributes:
        repo_id: the repository.
        files: size in bytes of each file by its path.
        left_out: files in the folder that are not part of the bundle.
        deleted: files of an earlier bundle in the repository, which this one does not have.
        kept: documents that somebody edited on the Hub, and that were left as they are there.
        is_card_edited: the card is the one that somebody edited in the folder.
        license: in the generated card; None if the license of the weights is unknown.
        url: of the commit, None for a dry run.
        commit: its id, None for a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    deleted: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    is_card_edited: bool
    license: str | None
    url: str | None = None
    commit: str | None = None

    @property
    def size_bytes(self) -> int:
        """Return the size of all files."""
        return sum(self.files.values())


def push_to_hub(
    bundle: Bundle | Path | str,
    repo_id: str,
    options: PushOptions | None = None,
    **changes: Any,
) -> PushResult:
    """Upload a bundle to a model repository, which is created if it is missing.

    Every file is hashed first. Only what belongs to the bundle is uploaded. The model card is
    written for the repository, unless somebody edited it: in the folder, then that one is
    uploaded; or on the Hub, then it stays. Nothing in the folder is changed.

    Args:
        bundle: an opened bundle, or its folder.
        repo_id: such as ``me/gemma-3-270m-onnx``.
        options: where to and how.
        changes: fields of :class:`PushOptions`, such as ``private=True``.

    Raises:
        InputError: the bundle is damaged or unproven, the repository or token is not valid, or the
            Hub denies access.
        UnavailableError: the Hub cannot be reached, or fails.
        Gemma3ExportError: what the Hub has afterwards is not what was sent.
    """
    chosen = merged(PushOptions, options, changes)
    bundle = Bundle(bundle.path if isinstance(bundle, Bundle) else bundle)  # with all variants
    _check_repo_id(repo_id)
    _check_proven(bundle, is_allowed=chosen.allow_unproven)
    report = chosen.progress or ignore_progress
    report("checking files", 0, 1)
    bundle.check_files()
    report("checking files", 1, 1)
    upload = _Upload.of(bundle, repo_id)
    result = PushResult(
        repo_id=repo_id,
        files=upload.sizes(),
        left_out=tuple(name for name in foreign_files(bundle.path) if name not in upload.texts),
        is_card_edited=bundle.is_edited(CARD),
        license=license_of(bundle.config, bundle.manifest),
    )
    return result if chosen.dry_run else _push(upload, result, chosen)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r:.80} is not a Hub repository id: {error}") from error
    if "/" not in repo_id:
        raise InputError(
            f"{repo_id!r:.80} does not say whose repository it is; give OWNER/NAME, such as "
            f"your-name/{repo_id:.80}"
        )


def _check_proven(bundle: Bundle, *, is_allowed: bool) -> None:
    unproven = [graph for graph in bundle.manifest.graphs if not graph.verified]
    if unproven and not is_allowed:
        raise InputError(
            f"{bundle.path} is not proven: {' and '.join(graph.path for graph in unproven)} "
            f"was exported with --no-verify; prove it with `gemma3-export verify {bundle.path} "
            "--weights SRC --stamp`, or pass --allow-unproven, and the card will say so"
        )


@dataclass(frozen=True, slots=True)
class _Upload:
    """The files of a bundle as a repository will have them."""

    bundle: Bundle
    manifest: Manifest  # with the hashes of the documents that are written for the repository
    texts: dict[str, bytes]  # documents and manifest

    @classmethod
    def of(cls, bundle: Bundle, repo_id: str) -> _Upload:
        """Prepare the upload of ``bundle`` to ``repo_id``."""
        written = documents_of(
            bundle.config,
            bundle.manifest,
            read_proofs(bundle.path),
            repo_id=repo_id,
        )
        files = {k: v for k, v in bundle.manifest.files.items() if k not in DOCUMENTS}
        texts: dict[str, bytes] = {}
        for name, text in written.items():
            data = text.encode()
            files[name] = FileRecord(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
            if bundle.is_edited(name):
                data = read_bytes(bundle.file(name), limit_bytes=MAX_DOCUMENT_BYTES)
                files[name] = bundle.manifest.files.get(name, files[name])
            texts[name] = data
        manifest = replace(bundle.manifest, files=dict(sorted(files.items())))
        return cls(bundle, manifest, texts)

    def paths(self) -> dict[str, Path]:
        """Return the files that are uploaded as they are."""
        return {
            name: self.bundle.file(name) for name in self.manifest.files if name not in DOCUMENTS
        }

    def contents(self) -> dict[str, bytes]:
        """Return the files that are written for the repository."""
        return self.texts | {MANIFEST: manifest_to_json(self.manifest).encode()}

    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        found = {name: self.manifest.files[name].size_bytes for name in self.paths()}
        found |= {name: len(data) for name, data in self.contents().items()}
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class _Remote:
    """What a branch has before the upload."""

    names: frozenset[str]
    manifest: Manifest | None  # of an earlier upload of this program
    documents: dict[str, bytes]

    def edited(self) -> set[str]:
        """Return the documents that somebody wrote or edited on the Hub."""
        return {
            name
            for name, data in self.documents.items()
            if self.manifest is None
            or name not in self.manifest.files
            or self.manifest.files[name].sha256 != hashlib.sha256(data).hexdigest()
        }


def _push(upload: _Upload, result: PushResult, options: PushOptions) -> PushResult:
    from huggingface_hub import HfApi, get_token

    from gemma3_export.hub_errors import LOG_IN, explain_hub_error

    if options.token is None and get_token() is None:
        raise InputError(f"there is no Hub token; {LOG_IN}")
    api = HfApi(token=options.token, library_name="gemma3-export")
    repo_id, branch = result.repo_id, options.revision or DEFAULT_BRANCH
    try:
        _open_repository(api, repo_id, branch, is_private=options.private)
        remote = _read_remote(api, repo_id, branch)
        return _commit(api, upload, remote, result, options)
    except Gemma3ExportError:
        raise
    except Exception as error:  # HTTP library, disk and Hub have no common error type
        raise explain_hub_error(
            error,
            "upload",
            repo_id,
            revision=options.revision,
            hint="Run the same command again to resume: files on the Hub are not sent again.",
        ) from error


def _open_repository(api: HfApi, repo_id: str, branch: str, *, is_private: bool) -> None:
    """Create repository and branch unless they exist.

    Raises:
        InputError: the repository is public, and a private one was asked for.
    """
    api.create_repo(repo_id, private=is_private or None, exist_ok=True)
    if is_private and not api.repo_info(repo_id).private:
        raise InputError(
            f"{repo_id} exists and is public, so nothing was uploaded; make it private in its "
            "settings on the Hub, or leave out --private"
        )
    if branch != DEFAULT_BRANCH:
        api.create_branch(repo_id, branch=branch, exist_ok=True)


def _read_remote(api: HfApi, repo_id: str, branch: str) -> _Remote:
    """Read the manifest and the documents of a branch."""
    names = frozenset(api.list_repo_files(repo_id, revision=branch))
    found: dict[str, bytes] = {}
    for name in (MANIFEST, *DOCUMENTS):
        if name in names:
            path = Path(api.hf_hub_download(repo_id, name, revision=branch))
            limit = MAX_JSON_BYTES if name == MANIFEST else MAX_DOCUMENT_BYTES
            found[name] = read_bytes(path, limit_bytes=limit)
    manifest = found.pop(MANIFEST, None)
    return _Remote(names, None if manifest is None else _parsed(manifest), found)


def _parsed(data: bytes) -> Manifest | None:
    """Return a manifest of this program, None for another file of this name."""
    try:
        return to_record(json.loads(data), Manifest, where=MANIFEST, remedy="")
    except (InputError, ValueError, RecursionError):
        return None


def _commit(
    api: HfApi, upload: _Upload, remote: _Remote, result: PushResult, options: PushOptions
) -> PushResult:
    """Upload everything in one commit, and compare what the Hub has with it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    contents: dict[str, bytes] = upload.contents()
    kept = {
        name
        for name in remote.edited() & set(upload.texts)
        if name != GIT_ATTRIBUTES and not upload.bundle.is_edited(name)
    }
    for name in kept:
        del contents[name]
    if GIT_ATTRIBUTES in remote.documents:
        lines = remote.documents[GIT_ATTRIBUTES].decode("utf-8", "replace")
        ours = contents[GIT_ATTRIBUTES].decode("utf-8", "replace").splitlines()
        contents[GIT_ATTRIBUTES] = merge_attributes(lines, ours).encode()
    sent = upload.paths() | contents
    earlier = set() if remote.manifest is None else set(remote.manifest.files)
    deleted = sorted((earlier & remote.names) - set(sent) - set(DOCUMENTS))
    commit = api.create_commit(
        result.repo_id,
        [
            *(CommitOperationAdd(name, data) for name, data in sent.items()),
            *(CommitOperationDelete(name) for name in deleted),
        ],
        commit_message=options.commit_message or MESSAGE,
        revision=options.revision,
    )
    _check_arrival(api, result.repo_id, commit.oid, upload, contents)
    return replace(
        result,
        files=dict(
            sorted(
                (name, len(data) if isinstance(data, bytes) else result.files[name])
                for name, data in sent.items()
            )
        ),
        kept=tuple(sorted(kept)),
        deleted=tuple(deleted),
        url=commit.commit_url,
        commit=commit.oid,
    )


def _check_arrival(
    api: HfApi, repo_id: str, commit: str, upload: _Upload, contents: Mapping[str, bytes]
) -> None:
    """Compare the Hub's list of files with what was sent.

    Raises:
        Gemma3ExportError: a file is missing or another one.
    """
    from huggingface_hub.hf_api import RepoFile

    found = {
        item.path: item
        for item in api.list_repo_tree(repo_id, revision=commit, recursive=True)
        if isinstance(item, RepoFile)
    }
    records = {name: upload.manifest.files[name] for name in upload.paths()}
    wanted = {name: (record.size_bytes, record.sha256) for name, record in records.items()}
    wanted |= {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    }
    problems = []
    for name, (size, sha256) in wanted.items():
        item = found.get(name)
        if item is None:
            problems.append(f"{name} is missing")
        elif item.size != size or (item.lfs is not None and item.lfs.sha256 != sha256):
            problems.append(f"{name} differs")
    if problems:
        raise Gemma3ExportError(
            f"{repo_id} does not have what was uploaded ({'; '.join(problems[:8])}); if the "
            "repository has a .gitignore, remove it, and run the command again"
        )
