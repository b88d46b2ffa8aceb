"""Open weights from a folder, a file, the Hub, or a random seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import gemma3_export
from gemma3_export.bundle import MANIFEST
from gemma3_export.config import (
    CONFIG_NAME,
    PADDED_VOCAB_SIZE,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    SIZES,
    TEXT_VOCAB_SIZE,
    TOKENIZER_NAME,
    WEIGHTS_INDEX_NAME,
    Gemma3Config,
    config_from_json,
    load_config,
    load_json_object,
    preset,
)
from gemma3_export.config.gguf_config import config_from_gguf
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, to_path
from gemma3_export.gguf_file import first_of_split
from gemma3_export.reference.weights.checkpoint import CheckpointSource
from gemma3_export.reference.weights.hub import download
from gemma3_export.reference.weights.source import RandomSource, WeightSource
from gemma3_export.reference.weights.stores import (
    GgufStore,
    SafetensorsStore,
    TensorStore,
    TorchStore,
    read_shard_index,
)

__all__ = ["DEMO", "DEMO_FOLDER", "open_weights"]

DEMO = "demo"  # name of the model that this package includes
DEMO_FOLDER = Path(gemma3_export.__file__).parent / "demo_model"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Files that trainers and converters leave beside the weights.
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?|random_states_\d+)\.(bin|pt|pth|pkl)"
    r"|mmproj.*\.gguf"
)
GGUF_TOKENIZER = "tokenizer.ggml.model"  # key of every GGUF file with a tokenizer
SUFFIXES = (".safetensors", ".gguf", *TORCH_SUFFIXES)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Fields that may differ between two configs of one model.
NOT_COMPARED = {"pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"}
SHOWN_FIELDS = 4  # differing fields to show in full
STATED_IN_GGUF = ("rope_theta", "rope_scaling_factor", "rms_norm_eps", "sliding_window")


def open_weights(
    spec: str | None = None,
    *,
    size: str | None = None,
    config_path: Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    random_seed: int | None = None,
) -> WeightSource:
    """Open weights, reading only their headers.

    Args:
        spec: a Hugging Face folder, a ``.safetensors``, ``.gguf`` or ``.pt`` file, the id of a Hub
            repository, or ``demo`` for the model that this package includes.
        size: a published size; without ``spec``, its official Hub repository.
        config_path: the ``config.json`` to use instead of that of the weights.
        revision: branch, tag or commit of a Hub repository.
        token: Hub access token; defaults to that of ``hf auth login`` or HF_TOKEN.
        random_seed: draw random weights for ``size`` or ``config_path`` instead.

    Raises:
        InputError: the weights are missing, damaged, not accessible, or do not fit their config.
        UnavailableError: the Hub cannot be reached.
    """
    if random_seed is not None:
        return _open_random(spec, size, config_path, random_seed)
    if spec is None:
        if size is None:
            raise InputError("no weights given; pass --weights, --size or --random-weights")
        spec = preset(size).hub_id
        path = None
    else:
        path = _local_path(spec)
    if path is None:
        folder, commit = download(spec, revision=revision, token=token)
        location = f"{spec}@{commit}"
        return _open_path(folder, size, config_path, origin=location, location=location)
    if revision is not None:
        raise InputError(
            f"--revision is for Hub repositories, but {spec} is a local path; omit --revision"
        )
    return _open_path(path, size, config_path, origin=str(path), location=path.resolve().name)


def _open_random(
    spec: str | None, size: str | None, config_path: Path | None, seed: int
) -> WeightSource:
    if spec is not None:
        raise InputError("--weights and --random-weights cannot be combined; omit one of them")
    if config_path is not None:
        config = load_config(config_path)
        return RandomSource(_agree_with_size(config, size, str(config_path)), seed)
    if size is None:
        raise InputError(f"--random-weights needs --size ({', '.join(SIZES)}) or --config")
    return RandomSource(preset(size).config, seed)


def _local_path(spec: str) -> Path | None:
    """Return the file or folder that ``spec`` names, None if it is a Hub id."""
    if spec == DEMO:  # a folder of this name is ./demo
        return DEMO_FOLDER
    try:
        path = to_path(spec, "the weights").expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:
        raise InputError(f"{spec!r:.100} is not a valid path: {error}") from error
    if HUB_ID.fullmatch(spec) and path.suffix not in SUFFIXES:
        return None
    if spec.lower() in SIZES:
        raise InputError(f"{spec!r} is a size, not weights; pass --size {spec.lower()}")
    raise InputError(
        f"{spec!r:.200} does not exist; pass a folder, a file ({', '.join(SUFFIXES)}) or a Hub id "
        "such as google/gemma-3-270m"
    )


def _open_path(
    path: Path, size: str | None, config_path: Path | None, *, origin: str, location: str
) -> WeightSource:
    folder = path if path.is_dir() else path.parent
    store = _open_store(path)
    try:
        config = _agree_with_size(_describe(store, folder, size, config_path), size, origin)
        return CheckpointSource(
            store,
            config,
            origin=origin,
            location=location,
            tokenizer=_find_tokenizer(store, folder),
        )
    except BaseException:
        store.close()
        raise


def _find_tokenizer(store: TensorStore, folder: Path) -> Path | None:
    """Return the GGUF file if it has a tokenizer, else ``tokenizer.json`` next to the weights."""
    if isinstance(store, GgufStore) and store.reader.get_field(GGUF_TOKENIZER) is not None:
        return store.files[0]
    file = folder / TOKENIZER_NAME
    return file if is_file(file) else None


def _open_store(path: Path) -> TensorStore:
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return SafetensorsStore([path])
    if path.suffix == ".gguf":
        return GgufStore(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchStore([path])
    raise InputError(f"{path} is not a {', '.join(SUFFIXES)} file; convert it, or pass another")


def _open_folder(folder: Path) -> TensorStore:
    if is_file(folder / SAFE_WEIGHTS_INDEX_NAME):
        return _open_shards(folder / SAFE_WEIGHTS_INDEX_NAME, SafetensorsStore)
    if is_file(folder / SAFE_WEIGHTS_NAME):
        return SafetensorsStore([folder / SAFE_WEIGHTS_NAME])
    for suffixes in ((".safetensors",), (".gguf",), TORCH_SUFFIXES):
        if TORCH_SUFFIXES is suffixes and is_file(folder / WEIGHTS_INDEX_NAME):
            return _open_shards(folder / WEIGHTS_INDEX_NAME, TorchStore)
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix in suffixes and is_file(path) and not NOT_WEIGHTS.fullmatch(path.name)
        )
        if first := first_of_split(found):
            return _open_store(first)
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:10])
            raise InputError(f"{folder} has several weight files ({names}); pass one of them")
        if found:
            return _open_store(found[0])
    if is_file(folder / MANIFEST):
        raise InputError(_not_from_an_export(folder))
    raise InputError(
        f"{folder} has no {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, .gguf or .pt file; pass "
        "the folder of a model"
    )


def _open_shards(index: Path, open_files: Callable[[Sequence[Path]], TensorStore]) -> TensorStore:
    files, weight_map = read_shard_index(index)
    store = open_files(files)
    if wrong := sorted(weight_map.keys() ^ store.tensors.keys()):
        raise InputError(
            f"{index.name} and the shards disagree about {len(wrong)} tensors: "
            f"{', '.join(wrong[:10])}; download the folder again"
        )
    return store


def _not_from_an_export(folder: Path) -> str:
    """Return the error message for a bundle, with the weights that it was made from."""
    source = load_json_object(folder / MANIFEST).get("source")
    origin = source.get("location") if isinstance(source, dict) else None
    if origin == DEMO_FOLDER.name:
        origin = DEMO
    made_from = f" ({origin:.80})" if isinstance(origin, str) else ""
    return (
        f"{folder} is an export, not weights; pass the weights that it was made from{made_from}, "
        f"with -o {folder} to add another format to it"
    )


def _describe(
    store: TensorStore, folder: Path, size: str | None, config_path: Path | None
) -> Gemma3Config:
    """Return the first config found: given, in the checkpoint, next to it, or of ``size``."""
    from_gguf = config_from_gguf(store.reader) if isinstance(store, GgufStore) else None
    config_file = config_path or folder / CONFIG_NAME
    if config_path is None and isinstance(store, TorchStore) and store.model_config is not None:
        where = f"the config inside {store.files[0].name}"
        return config_from_json(store.model_config, where=where)
    if config_path is not None or is_file(config_file):
        config = load_config(config_file)
        if from_gguf is not None:
            _agree_with_gguf(config, from_gguf, config_file)
        return config
    if from_gguf is not None:
        return from_gguf
    if size is not None:
        return preset(size).config
    raise InputError(
        f"there is no config.json next to {store.files[0].name}; pass --config FILE or --size "
        f"({', '.join(SIZES)})"
    )


def _agree_with_gguf(config: Gemma3Config, from_gguf: Gemma3Config, where: Path) -> None:
    for key in STATED_IN_GGUF:
        stated, stored = getattr(config, key), getattr(from_gguf, key)
        if stated != stored:
            raise InputError(
                f"{key} is {stated!r} in {where}, but {stored!r} in the GGUF file; correct or omit "
                "the config"
            )


def _difference(name: str, stated: object, wanted: object) -> str:
    """Return a difference such as ``hidden_size is 64, not 640``.

    For lists, it is their length or the first element that differs.
    """
    if isinstance(stated, tuple) and isinstance(wanted, tuple):
        if len(stated) != len(wanted):
            return f"{name} has {len(stated)} entries, not {len(wanted)}"
        place = next(
            i for i, pair in enumerate(zip(stated, wanted, strict=True)) if len(set(pair)) > 1
        )
        name, stated, wanted = f"{name}[{place}]", stated[place], wanted[place]
    return f"{name} is {stated!r}, not {wanted!r}"


def _agree_with_size(config: Gemma3Config, size: str | None, where: str) -> Gemma3Config:
    """Check ``config`` against ``size``; return it with the end-of-text ids of both."""
    if size is None:
        return config
    expected = preset(size).config
    differing = {}
    for field in fields(Gemma3Config):
        stated, wanted = getattr(config, field.name), getattr(expected, field.name)
        if field.name == "vocab_size" and stated == PADDED_VOCAB_SIZE:
            stated = TEXT_VOCAB_SIZE
        if field.name not in NOT_COMPARED and stated != wanted:
            differing[field.name] = _difference(field.name, stated, wanted)
    if differing:
        shown, others = [*differing.values()][:SHOWN_FIELDS], [*differing][SHOWN_FIELDS:]
        more = f"; also different: {', '.join(others)}" if others else ""
        raise InputError(
            f"{where} is not a {size} model: {'; '.join(shown)}{more}; omit --size or pass the "
            "right one"
        )
    return replace(
        config, eos_token_id=tuple(dict.fromkeys((*config.eos_token_id, *expected.eos_token_id)))
    )
