"""The Helm chart renders to objects that Kubernetes has, with our flags, paths and metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tests.deploy.chart import RenderError, helm, rendered
from tests.deploy.checks import built, engine_paths, gateway_paths
from tests.docs.test_grafana_dashboard import known_metrics

kubernetes = pytest.importorskip("kubernetes")

HELM = Path(__file__).parents[2] / "deploy" / "helm"
CHART = HELM / "sapwood"
EVERYTHING = {
    "apiKeySecret": "keys",
    "engine": {
        "extraArgs": ["--context-length", "4096"],
        "modelClaim": "models",
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "models", "operator": "Exists"}],
    },
    "gateway": {"extraArgs": ["--max-concurrent-requests", "64"]},
    "autoscaling": {"enabled": True},
}
KINDS = {
    "Deployment": "V1Deployment",
    "Service": "V1Service",
    "ServiceAccount": "V1ServiceAccount",
    "Role": "V1Role",
    "RoleBinding": "V1RoleBinding",
    "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler",
}
every_form = pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])


def objects(values: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found = rendered(CHART, values, release="sapwood")
    named = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(named) == len(found)
    return named


def pods(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, pod, its one container) of both deployments."""
    found = []
    for name in ("engine", "gateway"):
        pod = objects(values)["Deployment", f"sapwood-{name}"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        found.append((name, pod, container))
    return found


def check_fields(value: Any, kind: str, place: str) -> None:
    """Every field is one of the API's, by the types of Kubernetes' own client."""
    if inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        assert isinstance(value, list), f"{place} is no list"
        for i, item in enumerate(value):
            check_fields(item, inner[1], f"{place}[{i}]")
    elif inner := re.fullmatch(r"[Dd]ict[(\[](\w+), (\w+)[)\]]", kind):
        assert isinstance(value, dict), f"{place} is no mapping"
        for name, item in value.items():
            check_fields(item, inner[2], f"{place}.{name}")
    elif model := getattr(kubernetes.client, kind, None):
        assert isinstance(value, dict), f"{place} is no mapping"
        types = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
        for name, item in value.items():
            assert name in types, f"{place}.{name}: {kind} has no such field"
            check_fields(item, types[name], f"{place}.{name}")
    elif kind != "object":
        python = {"str": str, "int": int, "bool": bool}[kind]
        assert type(value) is python, f"{place} is {value!r}, not {kind}"


def test_helm_finds_nothing_wrong() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


@every_form
def test_every_object_has_only_fields_of_the_api(values):
    found = objects(values)
    for (kind, name), one in found.items():
        check_fields(one, KINDS[kind], f"{kind} {name}")
    assert ("HorizontalPodAutoscaler" in {kind for kind, _ in found}) == bool(values)


def test_the_check_of_fields_finds_what_is_wrong():
    good = objects({})["Service", "sapwood"]
    for path, value in ((("spec", "prots"), []), (("spec", "ports"), {}), (("kind",), 1)):
        wrong = yaml.safe_load(yaml.safe_dump(good))
        place = wrong
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(AssertionError):
            check_fields(wrong, "V1Service", "Service")


@every_form
def test_the_commands_are_accepted_with_their_options(values):
    (_, _, engine), (_, _, gateway) = pods(values)
    served = built(engine["args"])
    assert served["port"] == engine["ports"][0]["containerPort"] == 30000
    assert served["enable_metrics"] is True
    assert served["model"] == "smollm2-135m"
    assert served.get("context_length") == (4096 if values else None)
    routed = built(gateway["args"])
    assert routed["port"] == gateway["ports"][0]["containerPort"] == 8000
    assert routed["service_discovery_port"] == served["port"]
    assert routed["service_discovery_namespace"] == "models"
    labels = objects(values)["Deployment", "sapwood-engine"]["spec"]["template"]["metadata"]
    selector = dict(label.split("=") for label in routed["selector"].split("\n"))
    assert selector == labels["labels"]
    assert labels["annotations"]["prometheus.io/port"] == str(served["port"])
    assert labels["annotations"]["prometheus.io/path"] == "/metrics"


def test_a_flag_that_does_not_exist_is_found():
    _, _, engine = pods({"engine": {"extraArgs": ["--no-such-flag"]}})[0]
    with pytest.raises(click.UsageError, match="no option --no-such-flag"):
        built(engine["args"])


@every_form
def test_pods_drain_before_they_are_killed(values):
    for _, pod, container in pods(values):
        [_, seconds] = container["lifecycle"]["preStop"]["exec"]["command"]
        drain = built(container["args"])["drain_timeout"]
        assert pod["terminationGracePeriodSeconds"] >= drain + int(seconds) + 15


def test_the_chart_refuses_to_kill_a_pod_that_drains():
    with pytest.raises(RenderError, match="at least drainTimeout"):
        objects({"drainTimeout": 61})
    objects({"drainTimeout": 61, "terminationGracePeriodSeconds": 81})


@every_form
def test_probes_ask_paths_that_need_no_key(values):
    for (name, _, container), known in zip(
        pods(values), (engine_paths, gateway_paths), strict=True
    ):
        probes = [one for key, one in container.items() if key.endswith("Probe")]
        assert len(probes) >= 2
        for probe in probes:
            assert probe["httpGet"]["path"] in known(), name
            assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}


@every_form
def test_pods_are_nobody_and_write_only_where_they_may(values):
    for _, pod, container in pods(values):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        # Else the service "sapwood" would set SAPWOOD_PORT to its own address.
        assert pod["enableServiceLinks"] is False
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        mounts = {one["name"] for one in container["volumeMounts"]}
        assert mounts == {one["name"] for one in pod["volumes"]}


def test_every_metric_of_the_autoscaler_is_ours_and_the_adapter_gives_it():
    scaler = objects(EVERYTHING)["HorizontalPodAutoscaler", "sapwood-engine"]["spec"]
    asked = {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]}
    rules = yaml.safe_load((HELM / "adapter-rules.yaml").read_text("utf-8"))["rules"]["custom"]
    given = set()
    for rule in rules:
        metric = rule["seriesQuery"].partition("{")[0]
        assert metric in known_metrics()
        new = rule["name"]["as"].replace("${1}", r"\1")
        given.add(re.sub(rule["name"]["matches"], new, metric))
    assert asked == given == {"sapwood_num_queue_reqs", "sapwood_num_running_reqs"}
    target = scaler["scaleTargetRef"]
    scaled = objects(EVERYTHING)[target["kind"], target["name"]]
    assert scaled["apiVersion"] == target["apiVersion"]
    # With a number of replicas each upgrade would undo what the autoscaler did.
    assert "replicas" not in scaled["spec"]


def test_the_gateway_may_watch_pods_and_nothing_else():
    found = objects({})
    account = found["Deployment", "sapwood-gateway"]["spec"]["template"]["spec"][
        "serviceAccountName"
    ]
    [subject] = found["RoleBinding", "sapwood-gateway"]["subjects"]
    assert (subject["name"], subject["namespace"]) == (account, "models")
    assert found["Role", "sapwood-gateway"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
