"""Hostile bundles, and requests to a sound one."""

from __future__ import annotations

import hashlib
import json
import random
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemma3_export.bundle import DOCUMENTS
from tests.faults.harness import children
from tests.faults.harness.bytes_and_json import change_bytes, change_json
from tests.faults.harness.cases import INPUT, OUTPUT, Case
from tests.faults.harness.files import copy_tree, replace_file
from tests.support.exported_bundles import made_once
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

VOCAB_SIZE = 400
CONFIG = tiny_config(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    layer_types=("sliding_attention", "full_attention"),
)
BUNDLE = f"{INPUT}/bundle"
PROMPT = "the sea, the sea"


def sound_bundle() -> Path:
    """Return a shared bundle with an ONNX graph and a TorchScript archive."""

    def make(folder: Path) -> None:
        with children.scratch_folder() as place:
            write_hf_folder(place / INPUT, CONFIG, seed=5)
            tiny_gemma_tokenizer(VOCAB_SIZE).save(place / INPUT)
            arguments = ["--weights", INPUT, "-o", OUTPUT, "--threads", "1", "--no-verify"]
            for command in ("onnx", "torchscript"):
                finished = children.run([command, *arguments], place)
                assert finished.code == 0, finished
            copy_tree(place / OUTPUT, folder)

    return made_once("faults/bundle", make)


def bundle_case(folder: Path, rng: random.Random) -> Case:
    """Change one file of a bundle, and generate, inspect or verify."""
    bundle = folder / "bundle"
    copy_tree(sound_bundle(), bundle)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    path = rng.choice([*files, bundle / "manifest.json", bundle / "manifest.json"])
    where = path.relative_to(bundle).as_posix()
    kind = rng.choice(("bytes", "json", "json", "file"))
    if kind == "json" and path.suffix == ".json":
        name, text = change_json(json.loads(path.read_text()), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == "file":
        name = replace_file(path, rng)
    else:
        name, data = change_bytes(path.read_bytes(), rng, header=rng.choice((200, 5000, None)))
        path.write_bytes(data)
    is_recorded = rng.random() < 0.4 and path.suffix != ".ts" and _record(bundle, path)
    name += " (recorded in the manifest)" if is_recorded else ""
    runtime = rng.choice(("onnx", "onnx", "torchscript"))
    generate = _generate("--runtime", runtime)
    check_tokens = partial(_check_tokens, _clean_completions(runtime), is_recorded)
    check_files = _check_any if is_recorded else partial(_check_files, sound_bundle())
    command, check = rng.choice(
        (
            (generate, check_tokens),
            (generate, check_tokens),
            ([*generate, "--check"], check_tokens),
            (["inspect", BUNDLE, "--json"], _check_json),
            (["inspect", BUNDLE, "--check"], check_files),
            (["verify", BUNDLE, "--threads", "1", "--json"], check_files),
        )
    )
    return Case(
        name=f"{where}: {name}, {command[0]}", arguments=command, check=check, has_output=False
    )


def _record(bundle: Path, path: Path) -> bool:
    """Record a changed file in the manifest, so that only its own reader can notice the change."""
    manifest = bundle / "manifest.json"
    if path == manifest or not path.is_file():
        return False
    data, raw = json.loads(manifest.read_text()), path.read_bytes()[: 2**24]
    record = data["files"].get(path.relative_to(bundle).as_posix())
    if record is None:
        return False
    record |= {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(raw).hexdigest()}
    manifest.write_text(json.dumps(data))
    return True


def _generate(*options: str) -> list[str]:
    fixed = ("--prompt", PROMPT, "--json", "--max-new-tokens", "6", "--threads", "1")
    return ["generate", BUNDLE, *fixed, *options]


@cache
def _clean_completions(runtime: str) -> list[dict[str, Any]]:
    with children.scratch_folder() as place:
        copy_tree(sound_bundle(), place / BUNDLE)
        finished = children.run(_generate("--runtime", runtime), place)
        assert finished.code == 0, finished
        return completions(finished.stdout)


def completions(stdout: str) -> list[dict[str, Any]]:
    """Return what `generate --json` printed, without what differs from run to run."""
    kept = ("text", "token_ids", "finish_reason")
    return [{key: item[key] for key in kept} for item in map(json.loads, stdout.splitlines())]


def _check_tokens(
    expected: list[dict[str, Any]], is_recorded: bool, place: Path, printed: str
) -> str | None:
    del place
    found = completions(printed)
    if is_recorded:  # another model, but a sound one
        ids = [token for answer in found for token in answer["token_ids"]]
        return None if all(0 <= token < VOCAB_SIZE for token in ids) else f"it generated {ids}"
    return None if found == expected else f"it generated {found}, not {expected}"


def _check_any(place: Path, printed: str) -> str | None:
    """Accept what the command says about a bundle whose manifest agrees with the change."""
    del place, printed
    return None


def _check_json(place: Path, printed: str) -> str | None:
    del place
    json.loads(printed)
    return None


def _check_files(sound_files: Path, place: Path, printed: str) -> str | None:
    """Check that every file that matters is the sound one, since the command found no fault."""
    del printed
    for sound in sound_files.rglob("*"):
        path = place / BUNDLE / sound.relative_to(sound_files)
        if sound.is_dir() or sound.name in ("manifest.json", "parity.json", *DOCUMENTS):
            continue
        if not path.is_file() or path.read_bytes() != sound.read_bytes():
            return f"{path.name} was changed, and that was not noticed"
    return None


# Requests

TEXTS = (
    PROMPT,
    "",
    " ",
    "\n",
    "\t\r\n",
    "a",
    "<bos>",
    "<end_of_turn>",
    "<start_of_turn>user\n",
    "\x1b[31m",
    "é\u0301\u202e\ufeff",
    "\U0001f30a" * 3,
    "the sea " * 200,
    "\udcff",
    "-",
    "--",
    "{{ 7 * 7 }}",
    "%s%n",
)
NUMBERS = (
    *("0", "1", "-1", "2", "3", "0.5", "0.999", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", ""),
    *(
        "1e308",
        "2147483648",
        "18446744073709551616",
        "9" * 400,
        "0x10",
        "1_000",
        "1,5",
        "abc",
        " 7",
    ),
)
ID_LISTS = ("2,5,7", "2", "", ",", "2,,3", "-1", "400", "399", "4294967296", "9" * 30, "2;3", "1e3")
SIZES = ("0", "1", "1KB", "256MB", "1e3MB", "-1MB", "9" * 30 + "GB", "MB", "nan", "1.5MB", "")
OPTIONS: dict[str, tuple[str, ...]] = {
    "--max-new-tokens": ("1", "2", "9", *NUMBERS),
    "--temperature": NUMBERS,
    "--top-k": NUMBERS,
    "--top-p": NUMBERS,
    "--min-p": NUMBERS,
    "--repetition-penalty": NUMBERS,
    "--frequency-penalty": NUMBERS,
    "--presence-penalty": NUMBERS,
    "--seed": NUMBERS,
    "--stop": TEXTS,
    "--prompt-lookup": NUMBERS,
    "--prefix-cache": SIZES,
    "--prefill-chunk": NUMBERS,
    "--logprobs": NUMBERS,
    "--threads": ("1", "2", "0", "-1", "1000", "9" * 30, "x"),
    "--device": ("cpu", "auto", "cuda", "cuda:99", "", "tpu", "cuda:-1"),
    "--runtime": ("onnx", "torchscript", "pt2", "reference", "x"),
    "--system": TEXTS,
    "--draft-model": ("nowhere", INPUT, BUNDLE, ""),
}

SOUND_VALUES: dict[str, tuple[str, ...]] = {
    "--max-new-tokens": ("1", "9", "60"),
    "--temperature": ("0", "0.7", "1.5"),
    "--top-k": ("1", "5", "400"),
    "--top-p": ("0.5", "1"),
    "--min-p": ("0.1",),
    "--repetition-penalty": ("0.7", "1.3"),
    "--frequency-penalty": ("-2", "0.5"),
    "--presence-penalty": ("2", "-0.5"),
    "--seed": ("7", "0"),
    "--stop": ("e", "a", "\u2581"),
    "--prompt-lookup": ("0", "4"),
    "--prefix-cache": ("0", "1MB"),
    "--prefill-chunk": ("1", "3"),
    "--logprobs": ("1", "5"),
    "--runtime": ("onnx", "torchscript"),
}


def request_case(folder: Path, rng: random.Random) -> Case:
    """Ask a sound bundle for something odd on the command line."""
    copy_tree(sound_bundle(), folder / "bundle")
    arguments = ["generate", BUNDLE, "--json", "--max-new-tokens", "5", "--threads", "1"]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("--prompt", "--prompt", "--prompt-ids", "--prompt-file"))
        if kind == "--prompt-file":
            (folder / "prompt.txt").write_bytes(
                rng.choice((rng.randbytes(50), b"the sea", b"", b"\xff", b"a" * 10_000))
            )
            arguments += [kind, f"{INPUT}/prompt.txt"]
        else:
            values = TEXTS if kind == "--prompt" else ID_LISTS
            arguments += [kind, rng.choice((values[0], rng.choice(values)))]
    for option in rng.sample(list(OPTIONS), rng.choice((0, 1, 1, 2, 3))):
        is_sound = option in SOUND_VALUES and rng.random() < 0.6
        arguments += [option, rng.choice((SOUND_VALUES if is_sound else OPTIONS)[option])]
    if rng.random() < 0.2 or "--system" in arguments:
        arguments.append("--chat")
    return Case(
        name=" ".join(arguments[7:])[:300].encode("unicode_escape").decode(),
        arguments=arguments,
        check=partial(_check_answers, arguments),
        is_checked_here=True,
        stdin=rng.choice((b"", b"the sea", b"\xff\xfe", b"\x00")),
        has_output=False,
    )


def _check_answers(arguments: list[str], place: Path, printed: str) -> str | None:
    """Check the answers of a request, and that another way to compute them gives the same."""
    found = [json.loads(line) for line in printed.splitlines()]
    asked = sum(argument in ("--prompt", "--prompt-ids", "--prompt-file") for argument in arguments)
    if len(found) != asked:
        return f"{len(found)} answers to {asked} prompts"
    values = dict(pairwise(arguments))
    limit = int(values["--max-new-tokens"])
    stops = [b for a, b in pairwise(arguments) if a == "--stop"]
    for answer in found:
        ids = answer["token_ids"]
        if len(ids) > limit:
            return f"{len(ids)} tokens instead of at most {limit}"
        if any(not 0 <= token < VOCAB_SIZE for token in ids):
            return f"a token is beyond the vocabulary: {ids}"
        if any(stop and stop in answer["text"] for stop in stops):
            return f"{answer['text']!r} contains a stop text"
    is_from_stdin = "-" in arguments
    if is_from_stdin:
        return None
    plain = ["--prompt-lookup", "0", "--prefix-cache", "0"]
    seeds = {answer.get("seed") for answer in found} - {None}
    if seeds:
        plain = ["--seed", str(seeds.pop())]
    again = children.run([*arguments, *plain], place)
    if again.code != 0:
        return f"without drafts and caches it exits with {again.code}: {again.stderr[-300:]}"
    if completions(again.stdout) != completions(printed):
        return f"computed otherwise, the answers are {completions(again.stdout)}"
    return None
