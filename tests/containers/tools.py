"""Docker's programs, Prometheus and mmdebstrap from Debian's archive, unpacked into a directory: nothing is installed.

Debian 12 has no compose and no buildx plugin; Debian 13's run on it. Needs apt and Debian 12 on x86-64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
_INSTALL = ("docker.io", "iptables", "mmdebstrap")  # with what they need and this host lacks
_DOWNLOAD = ("prometheus",)
_NEXT_RELEASE = ("docker-compose", "docker-buildx")
# iptables finds its libraries and extensions by absolute paths.
_WRAPPER = """#!/bin/sh
export LD_LIBRARY_PATH={libraries} XTABLES_LIBDIR={libraries}/xtables
exec {sbin}/xtables-nft-multi {name} "$@"
"""


class Tools:
    """The unpacked programs; ``environment`` puts them first on the PATH, with the plugins of the docker command."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        libraries, sbin = self.root / "usr/lib/x86_64-linux-gnu", self.root / "usr/sbin"
        self._fetch(directory)
        (directory / "bin").mkdir()
        for name in ("iptables", "ip6tables"):
            path = directory / "bin" / name
            path.write_text(_WRAPPER.format(libraries=libraries, sbin=sbin, name=name))
            path.chmod(0o755)
        configuration = directory / "docker-config"
        shutil.copytree(self.root / "usr/libexec/docker/cli-plugins", configuration / "cli-plugins")
        places = [str(directory / "bin"), str(self.root / "usr/bin"), str(sbin), os.environ["PATH"]]
        # Nothing of this host's own engine, builder or compose settings may reach the tests.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))}
        self.environment = clean | {"PATH": ":".join(places), "DOCKER_CONFIG": str(configuration)}

    def run(self, *command: str | Path, timeout: float = 600, **options: object) -> subprocess.CompletedProcess[str]:
        """Run ``command``; its output, both streams in one, is in ``stdout``."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **options,
        )

    def check(self, *command: str | Path) -> str:
        """Run ``command``; return what it printed, which is in the error if it fails."""
        result = self.run(*command)
        assert result.returncode == 0, f"{' '.join(map(str, command))}:\n{result.stdout[-3000:]}"
        return result.stdout

    def _fetch(self, directory: Path) -> None:
        source = next((path for path in _SOURCES if path.exists()), None)
        if source is None or "bookworm" not in source.read_text():
            raise RuntimeError(f"expected Debian 12 with its archive in {_SOURCES[0]} or {_SOURCES[1]}")
        self.source = source
        here = _Apt(directory / "apt", source)
        here.get("install", "--yes", "--no-install-recommends", "--download-only", *_INSTALL)
        here.get("download", *_DOWNLOAD)
        following = directory / f"next{source.suffix}"
        following.write_text(source.read_text().replace("bookworm", "trixie"))
        _Apt(directory / "apt-next", following).get("download", *_NEXT_RELEASE)
        self.root.mkdir()
        for package in sorted(directory.glob("apt*/**/*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(self.root)], check=True)
            package.unlink()


class _Apt:
    """apt with its lists and packages in ``directory``, so that the host's own stay as they are."""

    def __init__(self, directory: Path, source: Path) -> None:
        self._directory = directory
        for part in ("lists/partial", "cache/archives/partial"):
            (directory / part).mkdir(parents=True)
        settings = {
            "Dir::Etc::sourcelist": source,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": directory / "lists",
            "Dir::Cache": directory / "cache",
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "1",
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        self.get("update")

    def get(self, *arguments: str) -> None:
        """Run apt-get.

        Raises:
            RuntimeError: it failed; its output is in the message.
        """
        command = ["apt-get", "-q", *self._options, *arguments]
        result = subprocess.run(command, cwd=self._directory, capture_output=True, text=True, timeout=300)
        if result.returncode:
            raise RuntimeError(f"apt-get {' '.join(arguments)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
