"""Benchmarks against engines in other environments, with a fake engine of known speed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import benchmarks.peers
from benchmarks import environments
from benchmarks.peers import PEERS, SERVING, WORKERS, Peer
from benchmarks.peers.__main__ import main as peers_command
from gemma3_export.bench.peers import ENGINES, InstalledPeer, find_peer, model_folder
from gemma3_export.bench.process import peer_worker
from gemma3_export.bench.report import ratios
from gemma3_export.bench.run import BenchmarkOptions, run_benchmark
from gemma3_export.bundle import Bundle
from gemma3_export.cli import command_line
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from tests.bench.fake_peers.fake_worker import DECODE_S, FIRST_S
from tests.support.exported_bundles import exported_bundle

SMALL = ["--prompt-tokens", "20", "--new-tokens", "4", "--repeat", "2", "--threads", "1"]
FAKE_WORKER = Path(__file__).parent / "fake_peers" / "fake_worker.py"
AddFake = Callable[..., Path]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command_line, ["bench", *arguments])


def write_python(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the fake engine to those that a checkout can set up."""
    monkeypatch.setattr(benchmarks.peers, "WORKERS", FAKE_WORKER.parent)
    monkeypatch.setitem(PEERS, "fake", Peer(name="fake", module="fake_worker"))
    monkeypatch.setitem(ENGINES, "fake", ("good", "bad"))


@pytest.fixture
def add_fake(tmp_path: Path) -> AddFake:
    """Install the fake engine as the set-up does, and return the folder of all peers."""

    def add(bundle: Path, weight_format: str = "good", **habits: Any) -> Path:
        folder = tmp_path / "peers"
        python = folder / "fake" / "bin" / "python"
        write_python(python, f'exec "{sys.executable}" "$@"')
        model = model_folder("fake", weight_format, folder)
        model.mkdir(parents=True)
        (model / "habits.json").write_text(json.dumps(habits))
        InstalledPeer(
            name="fake",
            weight_format=weight_format,
            command=(str(python), "-P", str(SERVING), str(FAKE_WORKER)),
            made_from=Bundle(bundle).manifest.source,
            model=model,
        ).write()
        return folder

    return add


def test_a_peer_takes_turns_and_reports_its_own_numbers(
    add_fake: AddFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    done = run(
        *(str(bundle), *SMALL, "--batch", "2", "--against", "fake", "--against", "reference"),
        *("--peers", str(place), "--json"),
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert list(report["candidates"]) == ["onnx", "fake:good", "reference"]
    describe = report["candidates"]["fake:good"]["describe"]
    assert describe["dtype"] == "good"
    assert not describe["saw_pythonpath"], "our packages would mix with the peer's"
    (case,) = report["cases"]
    fake, ours = case["candidates"]["fake:good"], case["candidates"]["onnx"]
    assert fake["time_to_first_token_s"] == {"median": FIRST_S, "min": FIRST_S, "max": FIRST_S}
    assert fake["prefill_tokens_per_s"]["median"] == 2 * 20 / FIRST_S
    assert fake["decode_tokens_per_s"]["median"] == 2 * 4 / DECODE_S
    steps_per_s, bytes_per_s = 4 / DECODE_S, report["machine"]["read_bytes_per_s"]["max"]
    assert fake["share_of_bandwidth"] == pytest.approx(steps_per_s * 1000 / bytes_per_s)
    assert case["ratios"].keys() == {"fake:good", "reference"}
    ratio = case["ratios"]["fake:good"]["decode"]
    assert ratio["max"] == pytest.approx(ours["decode_tokens_per_s"]["max"] / (8 / DECODE_S))
    assert case["same_tokens"] == {"fake:good": 0.0, "reference": 1.0}


def test_cases_combine_every_prompt_with_every_batch_smallest_first() -> None:
    options = BenchmarkOptions(prompt_tokens=(16, 4), batch=(1, 3, 8))
    assert options.cases() == [(4, 1), (4, 3), (16, 1), (4, 8), (16, 3), (16, 8)]


def test_ratios_are_computed_within_a_round() -> None:
    def one(prefill: float, decode: float, memory: int) -> dict[str, float]:
        return {
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "peak_memory_bytes": memory,
        }

    rounds = [
        (one(30, 8, 5), one(10, 4, 6)),
        (one(10, 4, 4), one(10, 1, 8)),
        (one(40, 9, 3), one(20, 3, 7)),
    ]
    found = ratios(rounds)
    assert found["prefill"] == {"median": 2, "min": 1, "max": 3}
    assert found["decode"] == {"median": 3, "min": 2, "max": 4}
    assert found["memory"] == 8 / 5


def test_the_table_has_a_row_and_a_ratio_for_each_peer(add_fake: AddFake) -> None:
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    done = run(str(bundle), *SMALL, "--against", "fake:good", "--peers", str(place))
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "prompt 20, batch 1, 4 new tokens" in lines
    assert sum(line.startswith("fake:good  ") for line in lines) == 2, "loading, and speeds"
    assert sum("0.500 (0.500 to 0.500)" in line for line in lines) == 1
    assert sum(line.startswith("onnx against fake:good: prefill") for line in lines) == 1
    assert any("GB/s" in line for line in lines)


def test_quality_is_measured_against_full_precision(
    portable_bundle: Path, tiny_folder: Path, add_fake: AddFake, tmp_path: Path
) -> None:
    flat = tmp_path / "flat.npy"
    np.save(flat, np.zeros((192, 400), np.float32))
    options = BenchmarkOptions(
        prompt_tokens=(5,),
        new_tokens=2,
        repeat=1,
        threads=1,
        against=("fake",),
        peers=add_fake(portable_bundle, logits=str(flat)),
        weights=str(tiny_folder),
    )
    quality = run_benchmark(portable_bundle, options)["quality"]
    assert quality["onnx"]["mean_kld"] < 1e-8
    assert quality["onnx"]["top1_agreement"] == 1
    assert quality["onnx"]["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert quality["onnx"]["positions"] > 500
    # With uniform logits, the divergence is log(400) minus the entropy of the reference.
    assert 1e-4 < quality["fake:good"]["mean_kld"] < np.log(400)
    assert quality["fake:good"]["top1_agreement"] < 0.1


def test_a_plot_and_a_report_are_written(add_fake: AddFake, tmp_path: Path) -> None:
    bundle = exported_bundle("ort")
    plot, saved = tmp_path / "new" / "speeds.svg", tmp_path / "report.json"
    done = run(
        *(str(bundle), *SMALL, "--against", "fake", "--peers", str(add_fake(bundle))),
        *("--plot", str(plot), "--report", str(saved)),
    )
    assert done.exit_code == 0, done.output
    texts = [element.text for element in ElementTree.parse(plot).getroot().iter()]
    decode = json.loads(saved.read_text())["cases"][0]["candidates"]["fake:good"]
    assert f"{decode['decode_tokens_per_s']['median']:.1f}" == "16.0"
    assert {"onnx", "fake:good", "16.0", "prompt 20, batch 1"} <= set(texts)


def test_a_peer_that_is_not_set_up_is_reported_with_the_command(tmp_path: Path) -> None:
    done = run(
        str(exported_bundle("ort")), *SMALL, "--against", "llama.cpp:Q4_0", "--peers", str(tmp_path)
    )
    assert done.exit_code == UnavailableError.exit_code
    command = "python -m benchmarks.peers llama.cpp:Q4_0 --weights WEIGHTS --peers"
    assert f"{command} {tmp_path}" in done.stderr


@pytest.mark.parametrize("spec", ["llama.cpp:Q9", "onnx", "fake2"])
def test_unknown_peers_and_formats_are_rejected(spec: str) -> None:
    done = run(str(exported_bundle("ort")), *SMALL, "--against", spec)
    assert done.exit_code == InputError.exit_code
    assert spec.rpartition(":")[2] in done.stderr


def test_unknown_peers_are_rejected_with_all_choices(add_fake: AddFake) -> None:
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    for spec in ("fake2", "fake:bad"):
        done = run(str(bundle), *SMALL, "--against", spec, "--peers", str(place))
        assert done.exit_code == InputError.exit_code
        assert f"unknown peer '{spec}'" in done.stderr
        for choice in ("transformers:static", "reference", "llama.cpp", "fake:good"):
            assert choice in done.stderr


def test_an_engine_runs_in_its_default_format_unless_another_is_named(
    engine: None, add_fake: AddFake
) -> None:
    place = add_fake(exported_bundle("ort"), "bad")
    with pytest.raises(UnavailableError, match=r"fake:good is not set up.*benchmarks.peers fake"):
        find_peer("fake", place)
    add_fake(exported_bundle("ort"))
    assert find_peer("fake", place).weight_format == "good"
    assert find_peer("fake:bad", place).weight_format == "bad"


def test_a_peer_whose_files_are_gone_is_reported_with_the_command(add_fake: AddFake) -> None:
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    shutil.rmtree(place / "fake")
    done = run(str(bundle), *SMALL, "--against", "fake", "--peers", str(place))
    assert done.exit_code == UnavailableError.exit_code
    assert f"{Path('fake', 'bin', 'python')} is missing" in done.stderr
    assert "python -m benchmarks.peers fake:good --weights WEIGHTS" in done.stderr


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"name": "fake"}'])
def test_a_damaged_description_is_reported_with_its_file(text: str, add_fake: AddFake) -> None:
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    file = place / "models" / "fake-good" / "peer.json"
    file.write_text(text)
    done = run(str(bundle), *SMALL, "--against", "fake", "--peers", str(place))
    assert done.exit_code == InputError.exit_code
    assert f"{file} is damaged" in done.stderr


def test_the_benchmarks_modules_shadow_nothing_in_the_environment_of_a_peer(
    add_fake: AddFake,
) -> None:
    with peer_worker(find_peer("fake", add_fake(exported_bundle("ort"))), threads=1) as worker:
        path = worker.facts["describe"]["path"]
    assert str(SERVING.parent) not in path
    assert path[0] == str(FAKE_WORKER.parent)


def test_the_packaged_benchmark_does_not_need_a_checkout() -> None:
    program = (
        "import sys; sys.modules['benchmarks'] = None; "
        "import gemma3_export.bench.run, gemma3_export.bench.worker, gemma3_export.bench.quality"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_peer_with_other_weights_is_rejected(add_fake: AddFake) -> None:
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    peer = find_peer("fake", place)
    source = {"files": {"a": "1234"}, "location": "another.gguf"}
    dataclasses.replace(peer, made_from=source).write()
    done = run(str(bundle), *SMALL, "--against", "fake", "--peers", str(place))
    assert done.exit_code == InputError.exit_code
    assert "made from another.gguf" in done.stderr


@pytest.mark.parametrize(
    ("habits", "message"),
    [
        ({"in measurement": "raise"}, "fake:good failed: RuntimeError: the moon is full"),
        ({"in measurement": "die"}, r"fake:good process ended \(exit code 7\)"),
        ({"threads": 5}, "5 threads instead of 1"),
    ],
)
def test_a_peer_that_misbehaves_is_reported(
    habits: dict[str, Any], message: str, add_fake: AddFake
) -> None:
    bundle = exported_bundle("ort")
    options = BenchmarkOptions(
        prompt_tokens=(5,), threads=1, against=("fake",), peers=add_fake(bundle, **habits)
    )
    with pytest.raises(Gemma3ExportError, match=message):
        run_benchmark(bundle, options)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo Illegal instruction", "sent 'Illegal instruction"),
        ("echo '[1, 2]'", "instead of a JSON object"),
        ("""echo '{"load_s": 1}'""", "answered without import_s"),
        ("exit 9", r"ended \(exit code 9\)"),
    ],
)
def test_garbage_instead_of_an_answer_is_reported(
    command: str, message: str, add_fake: AddFake
) -> None:
    bundle = exported_bundle("ort")
    place = add_fake(bundle)
    write_python(place / "fake" / "bin" / "python", command)
    options = BenchmarkOptions(prompt_tokens=(5,), threads=1, against=("fake",), peers=place)
    with pytest.raises(Gemma3ExportError, match=message):
        run_benchmark(bundle, options)


def setting_up(place: Path, *arguments: str) -> Any:
    return CliRunner().invoke(peers_command, [*arguments, "--peers", str(place)])


def test_the_set_up_converts_float32_weights_and_records_their_origin(
    tiny_folder: Path, portable_bundle: Path, engine: None, tmp_path: Path
) -> None:
    place = tmp_path / "peers"
    write_python(place / "fake" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    done = setting_up(place, "fake", "--weights", str(tiny_folder))
    assert done.exit_code == 0, done.output
    model = place / "models" / "fake-good"
    assert json.loads((model / "habits.json").read_text())["tensors"] > 10
    found = find_peer("fake:good", place)
    found.check_weights(Bundle(portable_bundle).manifest.source)
    assert sorted(path.name for path in place.iterdir()) == ["fake", "models"]


def test_a_failed_conversion_leaves_nothing(
    tiny_folder: Path, engine: None, tmp_path: Path
) -> None:
    place = tmp_path / "peers"
    write_python(place / "fake" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    done = setting_up(place, "fake:bad", "--weights", str(tiny_folder))
    assert done.exit_code == UnavailableError.exit_code
    assert "converting to fake:bad failed with exit code 1" in done.output
    assert list((place / "models").iterdir()) == []


def test_a_failed_installation_leaves_no_environment(
    tiny_folder: Path, engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Any, purpose: str, variables: Any = None) -> None:
        (tmp_path / "peers" / "fake" / "bin").mkdir(parents=True, exist_ok=True)
        if "pip" in command:
            raise UnavailableError(f"{purpose} failed")

    monkeypatch.setattr(environments, "run", fail)
    done = setting_up(tmp_path / "peers", "fake", "--weights", str(tiny_folder))
    assert done.exit_code == UnavailableError.exit_code
    assert "installing fake failed" in done.output
    assert not (tmp_path / "peers" / "fake").exists()


@pytest.mark.parametrize("name", sorted(PEERS))
def test_every_peer_has_its_worker_and_exact_versions(name: str) -> None:
    peer = PEERS[name]
    assert (WORKERS / f"{peer.module}.py").exists()
    assert PEERS.keys() == ENGINES.keys()
    lines = peer.requirements.read_text(encoding="utf-8").splitlines()
    assert lines
    assert all("==" in line and "+" not in line for line in lines)
