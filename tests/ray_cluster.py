"""Ray on this machine alone, with its processes, logs and secrets in a folder that goes with it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

# Ray reads these when it is imported; its processes inherit them, and find tests' modules by the last.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

import ray
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_app_of
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

from dgemma_ext.integrations.ray import app, application
from dgemma_ext.integrations.ray.replica import Replica
from serving import wait_until

KEY = "correct-horse-battery"
# Seconds: a replica that starts imports torch and Ray, on a machine that may be busy.
PATIENCE = 240.0
ENGINE = "ray::ServeReplica:default:Engine"


class BreakableReplica(Replica):
    """A replica whose engine can be made to give up."""

    async def break_engine(self, name: str) -> None:
        if name == self._name:
            self._service.engine._runner.advance = self._broken

    def _broken(self) -> None:
        raise RuntimeError("broken by a test")


@dataclass
class Cluster:
    url: str
    folder: Path
    client: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        limits = httpx2.Limits(max_connections=64)
        headers = {"authorization": f"Bearer {KEY}"}
        self.client = httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE, limits=limits)

    def chat(self, body: dict[str, Any], **headers: str) -> httpx2.Response:
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def chats(self, bodies: list[dict[str, Any]], at_once: int = 16) -> Asking:
        return Asking(self, bodies, at_once)

    @property
    def handle(self) -> DeploymentHandle:
        return serve.get_deployment_handle("Engine", "default")

    @property
    def replicas(self) -> set[str]:
        """The names of the replicas that answer."""
        page = self.client.get("/metrics")
        return set(re.findall(r'replica="(\w+)"', page.text)) if page.status_code == 200 else set()

    def gauge(self, name: str) -> float:
        """A metric summed over the replicas."""
        page = self.client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", page, re.MULTILINE))

    def running(self, deployment: str = "Engine") -> int:
        found = serve.status().applications["default"].deployments[deployment]
        return found.replica_states.get("RUNNING", 0)

    def processes(self) -> list[psutil.Process]:
        """Those of the replicas, in this process's family alone."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(ENGINE):
                    found.append(process)
        return found

    def logged(self, words: str) -> int:
        """In how many lines of the processes' output the words stand."""
        files = (self.folder / "session_latest" / "logs").glob("worker-*.err")
        return sum(file.read_text(errors="replace").count(words) for file in files)


class Asking:
    """Requests that run in threads; `done` tells how many have been answered."""

    def __init__(self, cluster: Cluster, bodies: list[dict[str, Any]], at_once: int) -> None:
        self.done = 0
        self._counting = threading.Lock()
        self._cluster = cluster
        self._pool = ThreadPoolExecutor(at_once)
        self._answers = [self._pool.submit(self._ask, body) for body in bodies]

    def _ask(self, body: dict[str, Any]) -> httpx2.Response:
        try:
            return self._cluster.chat(body)
        finally:
            with self._counting:
                self.done += 1

    def answers(self) -> list[httpx2.Response]:
        try:
            return [answer.result(PATIENCE) for answer in self._answers]
        finally:
            self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Starts Ray and its proxy, and ends all of their processes."""
    folder = Path(tempfile.mkdtemp(prefix="dgemma-ray-", dir="/tmp"))  # sockets want a short path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
        yield Cluster(f"http://127.0.0.1:{port}", folder)
    finally:
        family = psutil.Process().children(recursive=True)
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def deploy(arguments: dict[str, Any]) -> None:
    """As `serve run dgemma_ext.integrations.ray:app name=value ...` does, with replicas that can be broken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGEMMA_API_KEY", KEY)
        patch.setattr(application, "Replica", BreakableReplica)
        serve.run(build_app_of(app, arguments))


def wait(condition: Any) -> None:
    wait_until(condition, PATIENCE)
