"""What every test shares: real servers on loopback, started on first use, ended by the session."""

from __future__ import annotations

pytest_plugins = [
    "tests.servers.http",
    "tests.servers.kafka",
    "tests.servers.postgres",
    "tests.servers.grafana",
    "tests.servers.prometheus",
]
