"""Write a bundle's documents: the model card, Git LFS patterns, and the license notice.

    README.md         the card that the Hugging Face Hub shows
    .gitattributes    which files Git stores as LFS objects
    NOTICE            the notice that the Gemma Terms of Use ask for, with weights of Gemma

They are in the manifest, but readers may edit them: no check of a bundle rejects that, and nothing
replaces a document that differs from the manifest.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemma3_export import __version__
from gemma3_export.bundle.genai_config import GENAI_CONFIG
from gemma3_export.bundle.inspection import summarize_proof
from gemma3_export.bundle.manifest import (
    CARD,
    GIT_ATTRIBUTES,
    NOTICE,
    PLOT,
    Graph,
    Manifest,
    default_graph,
)
from gemma3_export.bundle.transformers_js import WEB_DTYPES
from gemma3_export.bundle.variants import DEFAULT_STEM
from gemma3_export.config import TOKENIZER_NAME, Gemma3Config, preset_of
from gemma3_export.dtypes import EXPORT_DTYPES
from gemma3_export.files import is_file
from gemma3_export.staging import write_text_atomically

__all__ = [
    "GEMMA_NOTICE",
    "documents_of",
    "license_of",
    "merge_attributes",
    "render_card",
    "write_documents",
]

TEMPLATE = "card.md.jinja"
TERMS = "ai.google.dev/gemma/terms"
GEMMA_NOTICE = f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}"
HUB_LOCATION = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")  # as a fingerprint records it
LFS = "filter=lfs diff=lfs merge=lfs -text"
LFS_PATTERNS = (
    "*.onnx",
    "*.onnx_data",
    "*.onnx_data_*",
    "*.pt2",
    "torchscript/*.ts",
)
MAX_GIT_BYTES = 10_000_000  # the Hub stores no larger file outside LFS
FORMATS = {"onnx": "ONNX", "torchscript": "TorchScript", "pt2": "a torch.export program"}
ORT, ANY_ONNX = "ONNX Runtime", "any ONNX runtime"
PURPOSES = {
    ("onnx", "ort"): ORT,
    ("onnx", "portable"): ANY_ONNX,
    ("onnx", "web"): "browsers",
    ("torchscript", None): "PyTorch and libtorch",
    ("pt2", None): "PyTorch",
}
QUALITY = {"mean_kld", "top1_agreement", "perplexity_ratio"}
NUMPY_DTYPES = ("float32", "float16")  # cache types that numpy has
FULL_GRAPH = f"onnx/{DEFAULT_STEM}.onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class _CardGraph:
    """A graph as the card shows it."""

    runtime: str
    target: str
    path: str
    file_name: str
    purpose: str
    dtype: str  # the variant
    is_quantized: bool
    session_entries: dict[str, str]  # without which results can be wrong
    cache_dtype: str
    numpy_dtype: str | None
    size_bytes: int
    verified: bool


def render_card(
    config: Gemma3Config,
    manifest: Manifest,
    proofs: Mapping[str, Mapping[str, Any]],
    *,
    repo_id: str | None = None,
) -> str:
    """Return the model card of a bundle, in Markdown with YAML front matter.

    Args:
        config: the model.
        manifest: with all graphs and files.
        proofs: the content of ``parity.json``.
        repo_id: the Hub repository that the card is for; None for a folder, whose examples run
            in that folder, whatever its name.
    """
    source, files = manifest.source, manifest.files
    base, is_guess = base_model_of(config, source)
    has_onnx = any(graph.runtime == "onnx" for graph in manifest.graphs)
    graphs = [_describe(graph, manifest) for graph in manifest.graphs]
    checked = [
        (graph, summarize_proof(proof))
        for graph in graphs
        if graph.verified and (proof := proofs.get(graph.path))
    ]
    fitting = [graph for graph in manifest.graphs if _purpose(graph) in (ORT, ANY_ONNX)]
    onnx = _describe(default_graph(fitting), manifest) if fitting else None
    runtimes = list(dict.fromkeys(graph.runtime for graph in graphs))
    formats = " and ".join(FORMATS.get(runtime, runtime) for runtime in runtimes)
    has_tokenizer = TOKENIZER_NAME in files
    option = "" if has_onnx or len(runtimes) != 1 else f" --runtime {runtimes[0]}"
    reduced = source.get("reduced_vocabulary")
    adapter = source.get("adapter")
    text = _template().render(
        metadata=metadata_of(config, manifest),
        title=repo_id or f"{base or source.get('location', 'a model')} as {formats}",
        folder=repo_id.rpartition("/")[2] if repo_id else ".",
        place=repo_id or ".",
        repo_id=repo_id,
        version=manifest.versions.get("gemma3-export", __version__),
        versions=", ".join(f"{key} {value}" for key, value in sorted(manifest.versions.items())),
        parameters=config.num_parameters,
        context=config.max_position_embeddings,
        formats=formats,
        license=license_of(config, manifest),
        what="Gemma 3 text model" if license_of(config, manifest) else "Gemma-3-style text model",
        notice=f"{GEMMA_NOTICE}.",
        terms=TERMS,
        base=base,
        is_guess=is_guess,
        kind=source.get("kind", "unknown format"),
        location=str(source.get("location", "unknown")),
        adapter=adapter.get("location") if isinstance(adapter, Mapping) else None,
        vocabulary=f"{reduced.get('tokens')} of {reduced.get('of')} tokens"
        if isinstance(reduced, Mapping)
        else None,
        graphs=graphs,
        parity=checked,
        quantized=[
            (graph, proof)
            for graph, proof in checked
            if graph.is_quantized and proof.quality.keys() >= QUALITY
        ],
        is_proven=all(graph.verified for graph in graphs),
        has_plot=PLOT in files,
        has_windowed=any(graph.windowed_path for graph in manifest.graphs),
        right_padded=_right_padded(manifest),
        option=option,
        argument=option and f', runtime="{runtimes[0]}"',
        extra="cpu" if has_onnx else "export",
        verify_options=[_verify_options(runtime) for runtime in runtimes],
        has_tokenizer=has_tokenizer,
        is_chat=has_tokenizer and _is_chat(config),
        onnx=onnx,
        has_genai=GENAI_CONFIG in files,
        javascript=_javascript_options(graphs) if repo_id else None,
        archives=[graph.path for graph in graphs if graph.runtime == "torchscript"],
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def license_of(config: Gemma3Config, manifest: Manifest) -> str | None:
    """Return the Hub's name of the license of the weights, None if it is unknown."""
    if manifest.source.get("kind") == "random":
        return None
    base, _ = base_model_of(config, manifest.source)
    is_gemma = preset_of(config) is not None or (base or "").startswith("google/gemma")
    return "gemma" if is_gemma else None


def base_model_of(config: Gemma3Config, source: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the Hub id of the model that was exported, and whether its shape is all evidence."""
    if source.get("kind") == "random":
        return None, False
    if found := HUB_LOCATION.fullmatch(str(source.get("location", ""))):
        return found[1], False
    published = preset_of(config)
    return (None, False) if published is None else (published.hub_id, True)


def metadata_of(config: Gemma3Config, manifest: Manifest) -> dict[str, str | list[str]]:
    """Return the front matter of the card: https://huggingface.co/docs/hub/model-cards."""
    base, _ = base_model_of(config, manifest.source)
    runtimes = {graph.runtime for graph in manifest.graphs}
    dtypes = sorted({graph.dtype for graph in manifest.graphs})
    found: dict[str, str | list[str]] = {}
    if license_name := license_of(config, manifest):
        found["license"] = license_name
    if base is not None:
        is_tuned = "adapter" in manifest.source
        found["base_model"] = base
        found["base_model_relation"] = "finetune" if is_tuned else "quantized"
    if "onnx" in runtimes:
        is_web = any(graph.target == "web" for graph in manifest.graphs)
        found["library_name"] = "transformers.js" if is_web else "onnx"
    found["pipeline_tag"] = "text-generation"
    tags = ["gemma3-export", "gemma3_text", *sorted(runtimes), *dtypes]
    if TOKENIZER_NAME in manifest.files and _is_chat(config):
        tags.append("conversational")
    found["tags"] = tags
    return found


def merge_attributes(existing: str, lines: Iterable[str]) -> str:
    """Return ``.gitattributes`` with the missing ones of ``lines`` at its end."""
    found = existing.splitlines()
    return "\n".join([*found, *(line for line in lines if line not in found)]) + "\n"


def write_documents(
    folder: Path,
    config: Gemma3Config,
    manifest: Manifest,
    proofs: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the documents that a bundle's folder lacks.

    Args:
        folder: where the bundle is being prepared; a document in it is left as it is.
        config: the model.
        manifest: with all graphs and files but the documents.
        proofs: the content of ``parity.json``.

    Raises:
        Gemma3ExportError: the disk is full or not writable.
    """
    texts = documents_of(config, manifest, proofs)
    for document, text in texts.items():
        if not is_file(folder / document):
            write_text_atomically(folder / document, text)


def documents_of(
    config: Gemma3Config,
    manifest: Manifest,
    proofs: Mapping[str, Mapping[str, Any]],
    *,
    repo_id: str | None = None,
) -> dict[str, str]:
    """Return the documents of a bundle by file name; see :func:`render_card`."""
    patterns = [*LFS_PATTERNS]
    patterns += [
        name
        for name, record in manifest.files.items()
        if name == TOKENIZER_NAME and record.size_bytes > MAX_GIT_BYTES
    ]
    found = {
        CARD: render_card(config, manifest, proofs, repo_id=repo_id),
        GIT_ATTRIBUTES: merge_attributes("", (f"{pattern} {LFS}" for pattern in patterns)),
    }
    if license_of(config, manifest) == "gemma":
        found[NOTICE] = f"{GEMMA_NOTICE}\n"
    return found


def _describe(graph: Graph, manifest: Manifest) -> _CardGraph:
    sizes = [manifest.files[name].size_bytes for name in graph.own_files if name in manifest.files]
    return _CardGraph(
        runtime=graph.runtime,
        target=graph.target,
        path=graph.path,
        file_name=PurePosixPath(graph.path).name,
        purpose=_purpose(graph),
        dtype=graph.variant,
        is_quantized=EXPORT_DTYPES[graph.dtype].is_quantized,
        session_entries=graph.session_entries,
        cache_dtype=graph.cache_dtype,
        numpy_dtype=graph.cache_dtype if graph.cache_dtype in NUMPY_DTYPES else None,
        size_bytes=sum(sizes),
        verified=graph.verified,
    )


def _purpose(graph: Graph) -> str:
    target = graph.target if graph.runtime == "onnx" else None
    return PURPOSES.get((graph.runtime, target), graph.runtime)


def _verify_options(runtime: str) -> str:
    """Return the options with which ``verify`` checks all variants of ``runtime``."""
    return "" if runtime == "onnx" else f" --runtime {runtime}"


def _right_padded(manifest: Manifest) -> str:
    """Return the graphs that take no padding on the left, for a sentence."""
    return " and ".join(
        f"`{graph.path}`"
        for graph in manifest.graphs
        if graph.runtime == "onnx" and graph.target == "ort" and graph.cache_dtype != "float32"
    )


def _javascript_options(graphs: Sequence[_CardGraph]) -> str | None:
    """Return the options with which transformers.js loads a graph that its kernels can run."""
    for graph in graphs:
        if graph.target == "web":
            return f'{{ dtype: "{WEB_DTYPES[graph.dtype]}" }}'
    if any(graph.path == FULL_GRAPH and graph.dtype == "fp32" for graph in graphs):
        return f'{{ dtype: "{WEB_DTYPES["fp32"]}", use_external_data_format: true }}'
    return None


def _is_chat(config: Gemma3Config) -> bool:
    return len(config.eos_token_id) > 1


def _template() -> Any:
    # Imported here, because only exporting and publishing need it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=False,  # noqa: S701  # Markdown; what is not ours is quoted by a filter
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "tojson": _quote,
        "yaml": _yaml,
        "python": _quote,
        "shell": shlex.quote,
        "code": _code,
        "markdown": _escape,
    }
    return environment.get_template(TEMPLATE)


def _quote(text: str) -> str:
    """Return a string as JSON, YAML, Python and JavaScript write it."""
    return json.dumps(text, ensure_ascii=False)


def _yaml(text: str) -> str:
    """Return a string as YAML writes it, without quotes where it needs none."""
    return text if re.fullmatch(r"[A-Za-z]\w*([/-][\w.-]+|\w)", text) else _quote(text)


def _code(text: str) -> str:
    return "`" + re.sub(r"[`\s]+", " ", text) + "`"


def _escape(text: str) -> str:
    """Escape what Markdown would interpret."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", re.sub(r"\s+", " ", text))
