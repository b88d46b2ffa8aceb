"""Open weights from a folder, a file, the Hub, or a random seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
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
from gemma3_export.reference.weights.adapter import AdapterSource
from gemma3_export.reference.weights.adapter_folder import (
    ADAPTER_WEIGHT_NAMES,
    Adapter,
    is_adapter,
    open_adapter,
)
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
    r"|adapter_model\.(safetensors|bin)|mmproj.*\.gguf"
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
    adapter: str | None = None,
    size: str | None = None,
    config_path: Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    random_seed: int | None = None,
) -> WeightSource:
    """Open weights, reading only their headers.

    Args:
        spec: a Hugging Face folder, a ``.safetensors``, ``.gguf`` or ``.pt`` file, the id of a Hub
            repository, ``demo`` for the model that this package includes, or a LoRA adapter of
            PEFT, which is merged into the base that it names.
        adapter: folder or Hub id of a LoRA adapter to merge into the weights; without ``spec`` and
            ``size``, into the base that it names.
        size: a published size; without ``spec``, its official Hub repository.
        config_path: the ``config.json`` to use instead of that of the weights.
        revision: branch, tag or commit of a Hub repository.
        token: Hub access token; defaults to that of ``hf auth login`` or HF_TOKEN.
        random_seed: draw random weights for ``size`` or ``config_path`` instead.

    Raises:
        InputError: the weights are missing, damaged, not accessible, or do not fit their config.
        UnavailableError: the Hub cannot be reached.
    """
    if adapter is not None:
        return _open_merged(
            _locate_adapter(adapter, token),
            spec,
            size=size,
            config_path=config_path,
            revision=revision,
            token=token,
            random_seed=random_seed,
        )
    if random_seed is not None:
        return _open_random(spec, size, config_path, random_seed)
    if spec is None:
        if size is None:
            raise InputError(
                "no weights given; pass --weights, --adapter, --size or --random-weights"
            )
        spec = preset(size).hub_id
        at = _download(spec, revision, token)
    else:
        at = _locate(spec, revision, token)
    if not at.is_adapter:
        return _open_path(at, size, config_path)
    _reject_ambiguity(at)
    return _open_merged(at, None, size=size, config_path=config_path, token=token)


def _open_merged(
    adapter_at: _Location,
    spec: str | None,
    *,
    size: str | None,
    config_path: Path | None,
    revision: str | None = None,
    token: str | None,
    random_seed: int | None = None,
) -> WeightSource:
    """Open an adapter and its base: ``spec``, random weights, or the model that it names."""
    with ExitStack() as opened:
        adapter = open_adapter(
            adapter_at.folder, origin=adapter_at.origin, location=adapter_at.location
        )
        opened.callback(adapter.store.close)
        if random_seed is not None:
            base = _open_random(spec, size, config_path, random_seed)
        elif spec is not None:
            at = _locate(spec, revision, token)
            base = _open_path(at, size, config_path, adapter.tokenizer_file())
        else:
            base = _open_named_base(adapter, size, config_path, revision, token)
        opened.callback(base.close)
        merged = AdapterSource(base, adapter)
        opened.pop_all()
    return merged


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Location:
    """Where files are on this machine, and how to call that."""

    path: Path
    origin: str  # for messages
    location: str  # the same without local folders
    hub_id: str | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def is_adapter(self) -> bool:
        """Return whether this is an adapter, not a file next to one."""
        is_named = self.path.is_dir() or self.path.name in ADAPTER_WEIGHT_NAMES
        return is_named and is_adapter(self.folder)


def _locate(spec: str, revision: str | None, token: str | None) -> _Location:
    """Find a local path, or download a Hub repository.

    Raises:
        InputError: the path or repository does not exist.
        UnavailableError: the Hub cannot be reached.
    """
    path = _local_path(spec)
    if path is None:
        return _download(spec, revision, token)
    if revision is not None:
        raise InputError(
            f"--revision is for Hub repositories, but {spec} is a local path; omit --revision"
        )
    return _Location(path=path, origin=str(path), location=path.resolve().name)


def _download(hub_id: str, revision: str | None, token: str | None) -> _Location:
    folder, commit = download(hub_id, revision=revision, token=token)
    location = f"{hub_id}@{commit}"
    return _Location(path=folder, origin=location, location=location, hub_id=hub_id)


def _locate_adapter(spec: str, token: str | None) -> _Location:
    """Find the adapter in a local folder or a Hub repository, ``ID`` or ``ID@REVISION``."""
    hub_id, _, revision = spec.partition("@")
    if revision and HUB_ID.fullmatch(hub_id) and not Path(spec).exists():
        return _download(hub_id, revision, token)
    at = _locate(spec, None, token)
    if at.path.is_file() and at.path.name not in ADAPTER_WEIGHT_NAMES:
        raise InputError(
            f"{spec} is a file, not an adapter of PEFT; pass the folder that save_pretrained wrote"
        )
    return at


def _open_named_base(
    adapter: Adapter,
    size: str | None,
    config_path: Path | None,
    revision: str | None,
    token: str | None,
) -> WeightSource:
    """Open the official model of ``size``, or the one that an adapter says it was trained on.

    Raises:
        InputError: the adapter names no model, or one that cannot be opened.
    """
    if size is not None:
        at = _download(preset(size).hub_id, revision, token)
        return _open_path(at, size, config_path, adapter.tokenizer_file())
    name = adapter.config.base_model_name_or_path
    remedy = "pass the model that it was trained on with --weights"
    if not name:
        raise InputError(f"{adapter.origin} names no base model; {remedy}")
    try:
        if _local_path(name) is None:
            revision = revision or adapter.config.revision
        at = _locate(name, revision, token)
        if at.is_adapter:
            raise InputError(f"{name} is an adapter itself, and only one can be merged")
        return _open_path(at, None, config_path, adapter.tokenizer_file())
    except InputError as error:
        raise InputError(
            f"the base model of {adapter.origin} cannot be used: {error}; alternatively, {remedy}"
        ) from error


def _reject_ambiguity(at: _Location) -> None:
    """Reject a folder that holds both a model and an adapter.

    Raises:
        InputError: saying how to choose.
    """
    model = next((file for file in sorted(at.folder.iterdir()) if _is_model_file(file)), None)
    if model is None or not at.path.is_dir():
        return
    both = f"{at.origin} holds both a model ({model.name}) and an adapter; pass --weights "
    if at.hub_id is None:
        raise InputError(
            f"{both}{model} for the model alone, or --weights {model} --adapter {at.folder} to "
            "merge the adapter into it"
        )
    raise InputError(
        f"{both}{at.hub_id} --adapter {at.hub_id} to merge them, or the path of a downloaded "
        f"{model.name} for the model alone"
    )


def _is_model_file(file: Path) -> bool:
    if NOT_WEIGHTS.fullmatch(file.name) or not is_file(file):
        return False
    is_pytorch = file.suffix == ".bin" and file.name.startswith("pytorch_model")
    return is_pytorch or file.suffix in (".safetensors", ".gguf")


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
    at: _Location, size: str | None, config_path: Path | None, tokenizer: Path | None = None
) -> WeightSource:
    """Open a model; ``tokenizer`` takes the place of its own."""
    store = _open_store(at.path)
    try:
        config = _agree_with_size(_describe(store, at.folder, size, config_path), size, at.origin)
        return CheckpointSource(
            store,
            config,
            origin=at.origin,
            location=at.location,
            tokenizer=tokenizer or _find_tokenizer(store, at.folder),
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
