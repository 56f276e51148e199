"""What every test shares: real servers on loopback, started on first use, ended by the session."""

from __future__ import annotations

import importlib.util

pytest_plugins = [
    name
    for name in (
        "tests.servers.kafka",
        "tests.servers.postgres",
        "tests.servers.grafana",
        "tests.servers.prometheus",
    )
    if importlib.util.find_spec(name) is not None
]
