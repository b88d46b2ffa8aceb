"""README and docs for readers outside of the repository: on PyPI and on the documentation site.

Links between files are written for GitHub. For PyPI, they become links into the repository. For the
site, this module is a hook of MkDocs (see mkdocs.yml): the README becomes the home page, pages from
outside of docs/ join the others, links to source files lead into the repository, and the reference
is made from the names that `gemma3_export` exports.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["for_pypi", "on_files", "on_page_content", "on_page_markdown"]

REPOSITORY = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)\s]*)\)")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>)")
# Pages of the site that are not in docs/.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/cpp/README.md": "cpp.md",
    "examples/browser/README.md": "browser-example.md",
}
REFERENCE = "reference.md"
DIRECTIVE = "::: {name}\n    options:\n      heading_level: 3\n"


def for_pypi(readme: str, url: str | None, tag: str) -> str:
    """Return the README with links into the repository at ``tag``; without ``url``, plain text."""
    return relinked(readme, lambda path: f"{url}/blob/{tag}/{path}" if url else None)


def relinked(text: str, address: Callable[[str], str | None]) -> str:
    """Replace the address of each relative link; None leaves its text, and no picture."""

    def replaced(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        found = address(target)
        if found is None:
            return "" if picture else words
        if picture:
            found = found.replace("/blob/", "/raw/")
        return f"{picture}[{words}]({found})"

    return LINK.sub(replaced, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/, and the reference."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        if (REPOSITORY / source).exists():
            text = (REPOSITORY / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, REFERENCE, content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links of a page to other pages of the site, or into the repository."""
    sources = {page: source for source, page in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(source)

    def address(target: str) -> str | None:
        path, hash_sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        found = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(found) is not None:
            return f"{found}{hash_sign}{anchor}"
        return f"{config.repo_url}/blob/HEAD/{path}" if config.repo_url else None

    return relinked(markdown, address)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Remove the roles of Sphinx that docstrings have, such as ``:func:``."""
    del config, files
    return ROLE.sub("", html) if page.file.src_uri == REFERENCE else html


def reference() -> str:
    """Return the page of the Python API: a directive of mkdocstrings for each exported name."""
    tree = ast.parse((REPOSITORY / "gemma3_export/__init__.py").read_text(encoding="utf-8"))
    homes = {
        name.name: f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gemma3_export.")
        for name in node.names
    }
    classes = sorted(name for name in homes if name[0].isupper())
    functions = sorted(set(homes) - set(classes))
    parts = ["# Reference of the Python API\n\n[The guide](python.md) has examples.\n"]
    for title, names in (("Functions", functions), ("Classes", classes)):
        parts.append(f"## {title}\n")
        parts += [DIRECTIVE.format(name=homes[name]) for name in names]
    parts += ["## Tests\n", DIRECTIVE.format(name="gemma3_export.testing.assert_parity")]
    return "\n".join(parts)
