"""Every file in deploy/ is parsed, and what it names exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from oodmon.config.parse import load, loads
from oodmon.daemon.metrics import SERIES

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "oodmon.rules.yml"
CONTAINERS = sorted(DEPLOY.glob("Containerfile.*"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ENVIRONMENT = {
    "OODMON_STORE_URL": "postgresql://oodmon:x@postgres:5432/oodmon",
    "OODMON_GRAFANA_TOKEN": "token",
    "POD_NAME": "my-model-0",
}
FROM_OUTSIDE = {"up", "time", "absent"}


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def test_every_file_is_known_to_a_test() -> None:
    known = {
        "Containerfile.agent",
        "Containerfile.daemon",
        "compose.yaml",
        "grafana/provisioning/dashboards/oodmon.yaml",
        "grafana/provisioning/datasources/oodmon.yaml",
        "kafka/create-topics.sh",
        "kubernetes/sidecar.yaml",
        "oodmon.yaml",
        "prometheus/oodmon.rules.test.yml",
        "prometheus/oodmon.rules.yml",
        "prometheus/prometheus.yml",
        "systemd/oodmon.service",
    }
    found = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert found == known


# --- container files ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda path: path.name)
def test_container_files_copy_what_exists_and_run_as_nobody_special(file: Path) -> None:
    lines = re.sub(r"\\\n", " ", file.read_text()).splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"}
    known |= {"RUN", "STOPSIGNAL", "USER", "WORKDIR"}
    assert {word for word, _ in steps} <= known
    images = [rest for word, rest in steps if word == "FROM"]
    assert len(images) == 2, "built in one image, run in another"
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+-", image), f"{image}: not pinned"
    for word, rest in steps:
        if word == "COPY" and "--from=" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    (user,) = [rest for word, rest in steps if word == "USER"]
    assert user == "10001:10001"
    assert [word for word, _ in steps if word == "ENTRYPOINT"], "the exec form gets the signals"


def test_the_daemons_image_holds_no_torch_and_the_agents_does() -> None:
    daemon = (DEPLOY / "Containerfile.daemon").read_text()
    assert '".[kafka,grafana,postgres]"' in daemon
    assert '! /opt/oodmon/bin/python -c "import torch"' in daemon
    assert "HEALTHCHECK" in daemon
    assert ".[torch]" in (DEPLOY / "Containerfile.agent").read_text()


def test_extras_that_images_install_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for file in CONTAINERS:
        for extras in re.findall(r'"\.\[([a-z,]+)\]"', file.read_text()):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


# --- compose --------------------------------------------------------------------------------------


def test_compose_services() -> None:
    services = COMPOSE["services"]
    wanted = {"postgres", "kafka", "kafka-topics", "daemon", "prometheus", "grafana"}
    assert set(services) == wanted
    keys = {"image", "build", "command", "environment", "volumes", "ports", "depends_on"}
    keys |= {"healthcheck", "restart", "read_only", "tmpfs", "cap_drop", "security_opt"}
    keys |= {"mem_limit", "stop_grace_period"}
    for name, service in services.items():
        assert set(service) <= keys, name
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z]+)?$", service["image"]), service["image"]
        if service["restart"] != "no":
            assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
        for other in service.get("depends_on", {}):
            assert other in services


def test_compose_mounts_what_exists() -> None:
    made_by_the_user = {"./states", "./spool"}
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                exists = (DEPLOY / source).exists() or source in made_by_the_user
                assert exists, f"{name}: {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name}: {source}"
    build = COMPOSE["services"]["daemon"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_every_image_takes_the_torch_of_the_constraints() -> None:
    # Another one would be replaced by the next step's, from another index, with all of CUDA.
    for file in CONTAINERS:
        for step in re.findall(r"pip install [^\n]+", file.read_text()):
            assert "-c constraints.txt" in step, f"{file.name}: {step}"


def test_compose_says_whose_the_states_and_the_spool_are() -> None:
    # Mode 0600 and 0700: whoever else owns them, the daemon cannot read them, and refuses to.
    head = (DEPLOY / "compose.yaml").read_text().partition("services:")[0]
    assert "chown -R 10001:10001 deploy/states deploy/spool" in head


def test_the_sidecars_spool_is_not_the_volume_itself() -> None:
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "sidecar.yaml").read_text()))
    (config,) = [part for part in parts if part["kind"] == "ConfigMap"]
    (server,) = [part for part in parts if part["kind"] == "StatefulSet"]
    pod = server["spec"]["template"]["spec"]
    (mount,) = {
        mount["mountPath"]
        for container in pod["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == "spool"
    }
    path = yaml.safe_load(config["data"]["oodmon.yaml"])["daemon"]["feed"]["path"]
    # With an fsGroup a volume has mode 2775, and at each start so has what is in it.
    assert path.startswith(f"{mount}/")
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_compose_holds_no_password() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    for line in text.splitlines():
        if re.search(r"(PASSWORD|TOKEN|SECRET)\w*:", line) and not line.startswith("#"):
            assert "${" in line, line


def test_the_daemons_config_is_right_and_fits_compose() -> None:
    config = load(DEPLOY / "oodmon.yaml", "daemon", environment=ENVIRONMENT)
    assert config.daemon is not None
    assert config.daemon.http.port == 9464
    assert set(config.daemon.sinks) == {"log", "kafka", "grafana"}
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["daemon"]["volumes"]]
    assert config.daemon.calibration.path in mounts
    assert config.daemon.feed.component.path in mounts
    given = COMPOSE["services"]["daemon"]["environment"]
    text = (DEPLOY / "oodmon.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(given)


def test_topics_that_the_config_names_are_made() -> None:
    made = set(
        re.findall(r"^create (\S+)", (DEPLOY / "kafka/create-topics.sh").read_text(), re.MULTILINE)
    )
    named = set(re.findall(r"topic: ([\w.]+)", (DEPLOY / "oodmon.yaml").read_text()))
    assert named == made


def test_the_topics_script_asks_for_what_it_should(tmp_path: Path) -> None:
    tool = tmp_path / "kafka-topics.sh"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o700)
    environment = {"KAFKA_BIN": str(tmp_path), "REPLICAS": "3", "PATH": "/usr/bin:/bin"}
    script = str(DEPLOY / "kafka" / "create-topics.sh")
    subprocess.run(["sh", script], env=environment, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert "--topic oodmon.alerts.v1" in asked[0]
    assert all("--if-not-exists" in line and "min.insync.replicas=2" in line for line in asked)


# --- Prometheus -----------------------------------------------------------------------------------


def test_rules_ask_only_for_what_is_exported() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        names = set(re.findall(r"oodmon:[\w:]+|\boodmon_\w+", rule["expr"]))
        assert names <= SERIES | recorded, (rule, names - SERIES - recorded)
        assert names or "up{" in rule["expr"]


def test_alerts_say_what_a_person_needs_and_have_a_page() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    conventional = {"Down", "NoSamples", "Dropping", "Lagging", "SinkFailing", "DeadLetters"}
    conventional |= {"ReferenceStale", "ConfigReloadFailed", "OodRateHigh", "DriftDetected"}
    conventional |= {"DriftManyStreams"}
    assert {f"Oodmon{name}" for name in conventional} <= {rule["alert"] for rule in alerts}
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    sections = re.findall(r"^## (\S+)$", runbook, re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts], "one section per rule, in order"
    for rule in alerts:
        assert "for" in rule
        assert re.search(r"critical|warning|info|\$labels.severity", rule["labels"]["severity"])
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}
        assert notes["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="apt-get install prometheus brings promtool"
)


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ["check", "rules", "oodmon.rules.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "oodmon.rules.test.yml"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_agrees(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_the_daemon_of_compose() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "oodmon", "the rule OodmonDown names the job"
    assert job["static_configs"] == [{"targets": ["daemon:9464"]}]


# --- Grafana --------------------------------------------------------------------------------------


def test_grafana_finds_its_source_and_its_dashboards() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/oodmon.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in COMPOSE["services"]
    (provider,) = yaml.safe_load((folder / "dashboards/oodmon.yaml").read_text())["providers"]
    mounts = dict(v.split(":")[:2] for v in COMPOSE["services"]["grafana"]["volumes"])
    where = {target: mounted for mounted, target in mounts.items()}
    dashboards = (DEPLOY / where[provider["options"]["path"]]).resolve()
    assert list(dashboards.glob("*.json"))


# --- systemd and Kubernetes -----------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / "oodmon.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def test_the_systemd_unit_is_hardened_and_runs_what_exists() -> None:
    from oodmon.cli import main

    found = unit()
    for option in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "LockPersonality"):
        assert found[option] == ["true"], option
    assert found["ProtectSystem"] == ["strict"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["User"] == ["oodmon"]
    assert found["Restart"] == ["on-failure"]
    for line in (*found["ExecStartPre"], *found["ExecStart"]):
        program, verb, *arguments = line.split()
        assert program.endswith("/oodmon")
        command = main.get_command(None, verb)  # type: ignore[arg-type]
        assert command is not None, verb
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_agrees(tmp_path: Path) -> None:
    # The programs that it names are not installed here, and a missing one is an error to systemd.
    text = (DEPLOY / "systemd" / "oodmon.service").read_text()
    copy = tmp_path / "oodmon.service"
    copy.write_text(text.replace("/opt/oodmon/bin/oodmon", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if line.startswith("oodmon.service")]
    assert not complaints, done.stderr


def manifests() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes" / "sidecar.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_kubernetes_runs_the_daemon_locked_down() -> None:
    found = manifests()
    assert {"StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "Secret"} <= set(found)
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in pod["volumes"]} | {"spool"}
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert re.search(r":\d", container["image"]), "pinned"
    daemon = pod["containers"][1]
    assert daemon["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert daemon["livenessProbe"]["httpGet"]["path"] == "/healthz"
    labels = found["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("StatefulSet", "PodDisruptionBudget"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    config = loads(
        found["ConfigMap"]["data"]["oodmon.yaml"].encode(), "daemon", environment=ENVIRONMENT
    )
    assert config.daemon is not None
    assert config.daemon.store.pipeline == "my-model-0"
    mounts = {mount["mountPath"] for mount in daemon["volumeMounts"]}
    spool = Path(config.daemon.feed.component.path).parent
    assert {str(spool), config.daemon.calibration.path} <= mounts
