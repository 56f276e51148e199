"""Debian's Prometheus and promtool as plain processes, where they are installed.

``apt-get install --no-install-recommends prometheus`` brings both; no service is needed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.servers.processes import end, free_port, start
from tests.waiting import eventually

_HOW = "apt-get install --no-install-recommends prometheus"


class Prometheus:
    """A running server that scrapes what the test names.

    Attributes:
        url: of its HTTP API.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self, targets: list[str], job: str = "oodmon") -> None:
        """Start it; it scrapes these ``host:port`` every second."""
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": job, "static_configs": [{"targets": targets}]}],
        }
        file = self._folder / "prometheus.yml"
        file.write_text(json.dumps(config))  # JSON is YAML
        command = [
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        self._process = start(command, self._port, self._folder / "prometheus.log")

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query; an error of the query is an `OSError`."""
        with urlopen(
            f"{self.url}/api/v1/query?{urlencode({'query': expression})}", timeout=60
        ) as got:
            answer = json.load(got)
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """The result of the query once it has one."""
        found: list[dict[str, Any]] = []

        def has_one() -> bool:
            try:
                found[:] = self.query(expression)
            except OSError:  # not ready yet
                return False
            return bool(found)

        eventually(has_one, f"no result for {expression!r}")
        return found


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that the test starts with its targets."""
    if shutil.which("prometheus") is None:
        pytest.skip(f"no Prometheus: {_HOW}")
    server = Prometheus(tmp_path)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of promtool."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip(f"no promtool: {_HOW}")
    return found
