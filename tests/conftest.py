"""What every test shares: real servers on loopback, and the figures of the experiments."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Threads of torch that spin while they wait for one another make a busy machine ten times slower;
# read when torch is first imported, by this process and by those that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# How long an example takes says something about the machine only; chance is left to `make fuzz`.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

pytest_plugins = [
    "tests.figures",
    "tests.servers.http",
    "tests.servers.kafka",
    "tests.servers.postgres",
    "tests.servers.grafana",
    "tests.servers.prometheus",
]
