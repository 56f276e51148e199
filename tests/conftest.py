"""What every test shares: real servers on loopback, and the figures of the experiments."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# One thread of torch a process: figures do not depend on how many cores there are, and processes do
# not fight for them. Read when torch is first imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

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
