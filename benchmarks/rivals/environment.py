"""Virtual environments for rivals, whose requirements contradict ours.

Made once and kept in the user's cache folder. Packages for CUDA are never installed: the torch that
pip finds must be a build for CPUs (where pip finds another one, say so with PIP_INDEX_URL or
PIP_FIND_LINKS).

    python -m benchmarks.rivals.environment
"""

import hashlib
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path


class RivalError(RuntimeError):
    """A rival could not be installed or did not do what it was asked; the text says why."""


@dataclass(frozen=True)
class Rival:
    """`requirements` are installed as usual, `bare` ones then without their own requirements.

    `probe` is a statement that must run afterwards.
    """

    name: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...]
    probe: str


LMCACHE = Rival(
    name="lmcache",
    requirements=(
        "aiofile==3.12.3",
        "aiofiles==25.1.0",
        "aiohttp==3.14.5",
        "cachetools==8.0.1",
        "cryptography==50.0.2",
        "filelock==4.2.12",
        "jinja2==3.1.6",
        "msgspec==0.22.0",
        "networkx>=3.4",
        "numba>=0.61",
        "numpy==2.2.6",
        "prometheus_client==0.24.1",
        "psutil==7.2.2",
        "py-cpuinfo==9.0.0",
        "pyyaml==6.0.3",
        "pyzmq==27.3.0",
        "requests==2.34.2",
        "safetensors==0.8.0",
        "setuptools<81",
        "sortedcontainers==2.4.0",
        "sympy==1.14.0",
        "transformers>=5.4,<6",
    ),
    bare=("torch==2.13.0", "lmcache==0.5.6"),
    probe="import torch; import lmcache.v1.storage_backend.local_disk_backend",
)


def python_of(rival: Rival) -> Path:
    """The interpreter of the rival's environment; makes the environment if need be.

    Raises `RivalError` when something cannot be installed or does not run.
    """
    parts = repr((rival, sys.version_info[:2])).encode()
    folder = user_cache_path("kvcommons") / "rivals"
    home = folder / f"{rival.name}-{hashlib.sha256(parts).hexdigest()[:12]}"
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        finished = home / ".finished"
        if not finished.exists():
            shutil.rmtree(home, ignore_errors=True)
            print(f"Installing {rival.name} into {home} ...", file=sys.stderr)
            venv.create(home, with_pip=True)
            _install(rival, python)
            finished.touch()
    return python


def _install(rival: Rival, python: Path) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [*pip, *rival.requirements],
        [*pip, "--no-deps", *rival.bare],
        [str(python), "-I", "-c", rival.probe],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RivalError(f"{rival.name} cannot be used here:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    print(python_of(LMCACHE))
