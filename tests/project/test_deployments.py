"""The examples for Compose, Kubernetes, Prometheus and Grafana agree with the server and the image.

`make lint-examples` checks them against the schemas of their programs.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]

import gemma3_export
from gemma3_export import Engine
from gemma3_export.cli import command_line
from gemma3_export.serve.metrics import ServerMetrics
from gemma3_export.serve.settings import KEY_VARIABLE
from tests.project.test_dockerfile import instructions, stages
from tests.support.chat_templates import chat_bundle

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
KUBERNETES = EXAMPLES / "kubernetes"
# Names in PromQL that are followed by an operator, a selector or a range; functions have brackets.
METRIC = re.compile(r"\b(?:vllm:\w+|http_\w+)")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def kubernetes(name: str) -> Any:
    return read(KUBERNETES / f"{name}.yaml")


@pytest.fixture(scope="module")
def exported() -> str:
    """Return the metrics of a server that has answered a request."""
    model = gemma3_export.load(chat_bundle("functiongemma"), device="cpu", threads=1)
    with Engine(model, slots=1) as engine:
        metrics = ServerMetrics(engine, {"model_name": "tiny"})
        completion = engine.stream("The sea is", max_new_tokens=2).result()
        metrics.observe([completion], 0.1)
        metrics.count_response("/v1/completions", 200)
        return asyncio.run(metrics.text()).decode()


def expressions() -> dict[str, str]:
    """Return each PromQL expression of the examples by the place where it is."""
    found = {}
    dashboard = json.loads((EXAMPLES / "monitoring/dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard["templating"]["list"]:
        found[f"${variable['name']}"] = variable.get("definition", "")
    for rule in read(EXAMPLES / "monitoring/alerts.yaml")["groups"][0]["rules"]:
        found[rule["alert"]] = rule["expr"]
    page = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    (found["adapter"],) = re.findall(r"seriesQuery: '(.*)'", page)
    return found


def test_every_metric_that_is_asked_for_is_exported(exported: str) -> None:
    names = set(re.findall(r"^([\w:]+)[{ ]", exported, flags=re.MULTILINE))
    labels = set(re.findall(r"(\w+)=\"", exported)) | {"job", "le"}
    asked = 0
    for place, text in expressions().items():
        found = METRIC.findall(text)
        asked += len(found)
        assert set(found) <= names, place
        assert set(LABEL.findall(text)) <= labels | {"namespace", "pod"}, place
    assert asked > 20


def test_the_operator_s_rules_are_those_of_prometheus() -> None:
    alerts = read(EXAMPLES / "monitoring/alerts.yaml")
    assert kubernetes("prometheusrule")["spec"] == alerts


def serve_values(arguments: list[str], settings: dict[str, str]) -> dict[str, Any]:
    """Parse the arguments of a container as the command does."""
    filled = [re.sub(r"\$[({](\w+)(?::[-?][^)}]*)?[)}]", r"<\1>", word) for word in arguments]
    filled = [
        re.sub(r"<(\w+)>", lambda match: settings.get(match[1], "default"), word) for word in filled
    ]
    context = click.Context(command_line, **command_line.context_settings)
    command = command_line.get_command(context, filled[0])
    assert command is not None
    return command.make_context(filled[0], filled[1:], parent=context).params


def image(target: str) -> dict[str, str]:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    return dict(stages(instructions(text))[target])


def test_compose_runs_the_server_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    compose = read(EXAMPLES / "compose/compose.yaml")
    server = compose["services"]["server"]
    values = serve_values(server["command"], {})
    assert values["host"] == "0.0.0.0"
    assert str(values["key_path"]) == "/run/secrets/api_key"
    assert set(server["secrets"]) <= set(compose["secrets"])
    assert values["drain_s"] < int(server["stop_grace_period"].removesuffix("s"))
    assert "HEALTHCHECK" in image(server["build"]["target"])
    assert server["ports"] == [f"127.0.0.1:{values['port']}:{values['port']}"]
    (scrape,) = read(EXAMPLES / "compose/prometheus.yaml")["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"server:{values['port']}"]}]
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/api_key"
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (EXAMPLES / "compose" / source).exists(), source


def test_kubernetes_runs_the_server_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    pod = kubernetes("deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = kubernetes("configmap")["data"]
    values = serve_values(container["args"], settings)
    assert values["host"] == "0.0.0.0"
    assert (values["slots"], values["drain_s"]) == (8, float(settings["DRAIN_TIMEOUT"]))
    assert container["ports"] == [{"name": "http", "containerPort": values["port"]}]
    key_volume = next(
        each for each in container["volumeMounts"] if each["mountPath"] == "/secrets/gemma3"
    )
    assert key_volume["name"] == "api-key"
    assert str(values["key_path"]) == "/secrets/gemma3/api-key"
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert image("cpu")["USER"] == user
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait + values["drain_s"] < pod["terminationGracePeriodSeconds"]
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "liveness", "readiness")
    }
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    threads = container["resources"]
    assert threads["requests"] == threads["limits"]


def test_everything_in_kubernetes_selects_the_same_pods() -> None:
    deployment = kubernetes("deployment")["spec"]
    (labels,) = (deployment["template"]["metadata"]["labels"],)
    selectors = [
        deployment["selector"]["matchLabels"],
        kubernetes("service")["spec"]["selector"],
        kubernetes("poddisruptionbudget")["spec"]["selector"]["matchLabels"],
        kubernetes("networkpolicy")["spec"]["podSelector"]["matchLabels"],
        kubernetes("podmonitor")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    listed = set(kubernetes("kustomization")["resources"])
    optional = set(
        re.findall(r"# - (\S+)", (KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
    )
    there = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert listed | optional == there
    job = labels[kubernetes("podmonitor")["spec"]["jobLabel"]]
    alerts = (EXAMPLES / "monitoring/alerts.yaml").read_text(encoding="utf-8")
    assert f'job="{job}"' in alerts
    metric = kubernetes("autoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f"as: {metric}" in (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")


def test_the_yaml_in_the_page_parses() -> None:
    page = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        assert yaml.safe_load(block)
