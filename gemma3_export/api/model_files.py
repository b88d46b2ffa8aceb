"""What a model is loaded from: an exported bundle, or weights that the reference runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.bundle import MANIFEST, Bundle
from gemma3_export.config import TOKENIZER_NAME, Gemma3Config
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import is_file, to_path
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gemma3_export.reference.weights import WeightSource

__all__ = [
    "AUTO",
    "Weights",
    "bundle_tokenizer",
    "choose_runtime",
    "open_files",
    "require_torch",
    "tokenizer_of",
]

AUTO = "auto"  # the runtime that the files are for


class Weights:
    """Weights on this machine that run without an export, in PyTorch.

    They stay open, because their matrices are read whenever the model is loaded.

    Attributes:
        path: a folder or a file, as for ``--weights``.
        source: the weights.
        config: the model.
        tokenizer: the tokenizer that came with them, if any.

    Args:
        path: see above.

    Raises:
        InputError: they are missing or damaged, or do not fit their config or tokenizer.
        UnavailableError: torch is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            require_torch("reference")
        except UnavailableError as error:
            raise UnavailableError(
                f"{path} is not a gemma3-export bundle (no {MANIFEST}); to run it, {error}"
            ) from error
        from gemma3_export.reference.weights import open_weights

        self.path = path
        try:
            # open_weights gives some names that are not paths a meaning, such as `demo`.
            self.source: WeightSource = open_weights(
                str(path) if path.is_absolute() else f"./{path}"
            )
        except InputError as error:
            if not path.is_dir():
                raise
            raise InputError(
                f"{path} is not a gemma3-export bundle (no {MANIFEST}), and cannot be used as "
                f"weights: {error}"
            ) from error
        file = self.source.tokenizer_file()
        self.tokenizer: Tokenizer | None = None
        if file is not None:
            self.tokenizer = load_tokenizer(file)
            self.source.keep_rows(self.tokenizer.vocab_size)
            self.tokenizer.check_vocab_size(self.source.config.vocab_size)
        self.config: Gemma3Config = self.source.config

    def is_quantized(self, runtime: str) -> bool:
        """Return False: the reference computes in float32, whatever the weights are stored in."""
        del runtime
        return False

    def check_files(self) -> None:
        """Reject the check, which compares files with the manifest of an export.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.path} is not an export, so it has no manifest to check it against; leave out "
            "the check"
        )


def open_files(path: Path | str | Bundle | Weights, variant: str | None = None) -> Bundle | Weights:
    """Open a bundle, or else weights.

    Args:
        path: where they are; what is open already is returned.
        variant: which graphs of a bundle to use, such as ``int8``; None is the default, or what an
            opened bundle uses.

    Raises:
        InputError: there is neither at ``path``, it is damaged, or has no such variant.
        UnavailableError: there are weights, and torch is missing.
    """
    files: Bundle | Weights
    if isinstance(path, Bundle | Weights):
        files = path
    else:
        found = to_path(path, "the bundle")
        is_bundle = is_file(found / MANIFEST) or not found.exists()
        files = Bundle(found) if is_bundle else Weights(found)
    if isinstance(files, Bundle):
        return files.with_variant(variant)
    if variant is not None:
        raise InputError(
            f"{files.path} is not an export, so it has no variant {variant!r:.40}; leave the "
            "variant out"
        )
    return files


def choose_runtime(files: Bundle | Weights, runtime: str = AUTO) -> str:
    """Return ``runtime``, or for ``auto`` the one that the files are for.

    That is ``onnx`` if a bundle has it, otherwise the only graph that it has; and the reference for
    weights.

    Raises:
        InputError: ``auto`` has several to choose from, or the files are weights, which no other
            runtime than the reference can run.
    """
    if isinstance(files, Weights):
        if runtime not in (AUTO, "reference"):
            raise InputError(
                f"{files.path} is not an export, and the {runtime} runtime needs one: "
                f"gemma3-export onnx --weights {files.path} -o DIR; or leave out the runtime"
            )
        return "reference"
    if runtime != AUTO:
        return runtime
    runtimes = files.runtimes
    if "onnx" in runtimes or not runtimes:
        return "onnx"
    if len(runtimes) == 1:
        return runtimes[0]
    raise InputError(
        f"{files.path} has the runtimes {' and '.join(runtimes)}; choose one with --runtime "
        f"{runtimes[0]} (in Python, runtime={runtimes[0]!r})"
    )


def tokenizer_of(files: Bundle | Weights) -> Tokenizer | None:
    """Return the tokenizer of a bundle or of weights, checked against the model, or None.

    Raises:
        InputError: it is damaged, or belongs to another model.
    """
    return files.tokenizer if isinstance(files, Weights) else bundle_tokenizer(files)


def bundle_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """Return the tokenizer of ``bundle``, checked against its model, or None.

    Raises:
        InputError: it is damaged, or belongs to another model.
    """
    path = bundle.file(TOKENIZER_NAME)
    if not is_file(path):
        return None
    tokenizer = Tokenizer.from_file(path)
    tokenizer.check_vocab_size(bundle.config.vocab_size)
    return tokenizer


def require_torch(runtime: str) -> None:
    """Complain when torch is missing.

    Raises:
        UnavailableError: with the command that installs it.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError(
            f'the {runtime} runtime needs torch; run: pip install "gemma3-export[export]"'
        )
