"""A Docker engine of its own, in namespaces of its own: when its first process ends, nothing of it is left.

Mounts, bridges, packet filter chains, ports and processes of the engine and its containers live in its mount, network
and PID namespaces; images and volumes in memory, some 3 GB. Needs root. A host's own engine is neither used nor
disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .tools import Tools

_START_TIMEOUT_S = 60
# Loopback up (SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP), the images' directory in memory, then the daemon.
_FIRST_PROCESS = """
import fcntl, os, socket, struct, subprocess, sys
control = socket.socket()
request = struct.pack("16sh", b"lo", 0) + bytes(22)
flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, request)[:18])[1]
fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", flags | 1) + bytes(22))
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "images", sys.argv[1]], check=True)
os.execvp(sys.argv[2], sys.argv[2:])
"""
_FETCH = """
import json, sys, urllib.error, urllib.request
url, body, timeout = sys.argv[1], sys.argv[2].encode() or None, float(sys.argv[3])
request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer = response.status, response.read().decode()
except urllib.error.HTTPError as error:
    answer = error.code, error.read().decode()
except OSError as error:
    answer = None, str(error)
print(json.dumps(answer))
"""


class Engine:
    """The running daemon; ``docker(...)`` talks to it, ``fetch(url)`` sees its published ports."""

    def __init__(self, tools: Tools, directory: Path) -> None:
        self.tools = tools
        self._directory = directory
        (directory / "data").mkdir(parents=True)
        socket = f"unix://{directory}/docker.sock"
        daemon = ["dockerd", "--host", socket, "--data-root", str(directory / "data")]
        daemon += ["--exec-root", str(directory / "exec"), "--pidfile", str(directory / "pid"), "--ip6tables=false"]
        separate = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._log = directory / "dockerd.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*separate, sys.executable, "-c", _FIRST_PROCESS, str(directory / "data"), *daemon],
                env=tools.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.environment = tools.environment | {"DOCKER_HOST": socket, "DOCKER_BUILDKIT": "1"}
        began = time.monotonic()
        while self.docker("info", check=False).returncode:
            if self._process.poll() is not None or time.monotonic() - began > _START_TIMEOUT_S:
                log = self._log.read_text()[-3000:]
                self.close()
                raise RuntimeError(f"dockerd did not start:\n{log}")
            time.sleep(0.3)

    def docker(
        self, *arguments: str | Path, check: bool = True, timeout: float = 600, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run the docker command; both streams are in ``stdout``, and in the error if it fails and ``check`` is set."""
        result = subprocess.run(
            ["docker", *map(str, arguments)],
            env=self.environment | options.pop("environment", {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **options,
        )
        assert not check or result.returncode == 0, f"docker {' '.join(map(str, arguments))}:\n{result.stdout[-6000:]}"
        return result

    def fetch(self, url: str, body: object = None, timeout: float = 10) -> tuple[int | None, str]:
        """Status and body of ``url``, asked from the engine's network; None and the reason without an answer."""
        text = "" if body is None else json.dumps(body)
        inside = ["nsenter", "--net", "--target", str(self._first_process())]
        command = [*inside, sys.executable, "-c", _FETCH, url, text, str(timeout)]
        status, answer = json.loads(
            subprocess.run(command, capture_output=True, check=True, timeout=timeout + 30).stdout
        )
        return status, answer

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def close(self) -> None:
        """End containers and daemon in order, then everything that is left in the namespaces."""
        if self._process.poll() is None:
            with_children = self.docker("ps", "--quiet", check=False).stdout.split()
            if with_children:
                self.docker("rm", "--force", *with_children, check=False)
            os.kill(self._first_process(), signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        subprocess.run(["rm", "-rf", str(self._directory)], check=True)
