"""Replicas, and the arguments of an application of Ray Serve; needs no Ray."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma3_export import InputError
from gemma3_export.cli import serve_command
from gemma3_export.serve.ray_settings import RayOptions, read_arguments, send_token
from gemma3_export.serve.settings import ServeOptions
from tests.support.command_line import REPOSITORY, error_line, run_rejected


def test_arguments_of_a_command_line_are_text() -> None:
    found = read_arguments(
        {"bundle": "/models/a", "max_replicas": "3", "slots": "5", "body_s": "2"}
    )
    assert (found.cluster.min_replicas, found.cluster.max_replicas) == (1, 3)
    assert (found.engine.slots, found.engine.device, found.serve.body_s) == (5, "cpu", 2.0)
    assert (found.serve.model_name, found.serve.key) == ("a", None)


def test_a_request_has_at_most_as_many_choices_as_a_replica_has_places() -> None:
    args = {"bundle": "a", "slots": 2, "queue_limit": 3}
    assert read_arguments(args).serve.max_choices == 5
    assert read_arguments({"bundle": "a"}).serve == ServeOptions(model_name="a")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({}, "bundle"),
        ({"bundle": "a", "slot": 1}, "'slot'"),
        ({"bundle": "a", "key": "secret"}, "'key'"),
        ({"bundle": "a", "slots": "many"}, "slots"),
        ({"bundle": "a", "slots": 0}, "slots"),
        ({"bundle": "a", "replicas": 2, "max_replicas": 3}, "replicas"),
        ({"bundle": "a", "min_replicas": 2, "max_replicas": 1}, "max_replicas"),
        ({"bundle": "a", "replicas": 0}, "min_replicas"),
        ({"bundle": "a", "drain_s": "nan"}, "drain_s"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_arguments(args)


def test_the_example_for_kubernetes_has_valid_arguments() -> None:
    text = (REPOSITORY / "examples/ray/rayservice.yaml").read_text(encoding="utf-8")
    service = yaml.safe_load(text)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert set(config) <= {"proxy_location", "http_options", "applications"}
    (app,) = config["applications"]
    assert app["import_path"] == "gemma3_export.serve.ray_serve:build_app"
    assert app["route_prefix"] == "/"
    arguments = read_arguments(app["args"])
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert int(container["resources"]["limits"]["cpu"]) >= arguments.threads
    assert workers["maxReplicas"] >= arguments.cluster.max_replicas
    assert pod["terminationGracePeriodSeconds"] > arguments.serve.drain_s
    assert arguments.bundle.startswith(container["volumeMounts"][0]["mountPath"])


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--replicas needs --ray" in run_rejected("serve", "DIR", "--replicas", 2)
    monkeypatch.setattr(serve_command, "RAY", "not_installed")
    assert 'pip install "gemma3-export[ray]"' in error_line("serve", "DIR", "--ray", code=3)


def test_more_replicas_under_load_is_autoscaling() -> None:
    assert RayOptions(min_replicas=2, max_replicas=4).target_requests is None
    with pytest.raises(InputError, match="target_requests"):
        RayOptions(target_requests=0)


@pytest.mark.parametrize(
    "address", ["ray://host:10001", "head", "head:", ":6379", "head:http", "head:0", "head:65536"]
)
def test_an_address_is_auto_or_a_host_and_a_port(address: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(address))):
        RayOptions(address=address)


@pytest.mark.parametrize(
    ("address", "parts"), [("head:6379", ("head", 6379)), ("[::1]:1", ("::1", 1))]
)
def test_an_address_has_two_parts(address: str, parts: tuple[str, int]) -> None:
    assert RayOptions(address=address).host_and_port() == parts


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, None),
        ({"RAY_AUTH_TOKEN": "a"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "token"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "nothing"}, None),
        ({"RAY_AUTH_TOKEN": "a", "RAY_AUTH_MODE": "disabled"}, "disabled"),
    ],
)
def test_a_token_is_sent_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], mode: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("a")
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)} | variables)
    send_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode
