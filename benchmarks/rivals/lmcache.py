"""LMCache's back ends, driven from here so that their rounds and ours can alternate.

LMCache runs in a process and an environment of its own (`lmcache_server.py`); it moves the same
bytes, measures its own seconds, and is idle while we measure ours.

    with LmcacheRival(Path("folder"), block_bytes, num_blocks) as rival:
        seconds = rival.put("local_cpu")
        seconds = rival.get("local_cpu")
"""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from benchmarks.rivals.environment import LMCACHE, RivalError, python_of

Backend = Literal["local_cpu", "local_disk", "fs"]
BACKENDS: tuple[Backend, ...] = ("local_cpu", "local_disk", "fs")
SERVER = Path(__file__).with_name("lmcache_server.py")
STOP_S = 30.0


class LmcacheRival:
    """LMCache with a workload of its own, equal to `Workload(block_bytes, num_blocks, seed)`.

    `folder` is where it keeps its files. Raises `RivalError` where it cannot be used.
    """

    def __init__(self, folder: Path, block_bytes: int, num_blocks: int, seed: int = 0) -> None:
        # Isolated (-I), as the script's own folder has a module that is called lmcache.
        self._process = subprocess.Popen(
            [str(python_of(LMCACHE)), "-I", str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "LMCACHE_LOG_LEVEL": "ERROR"},
        )
        try:
            self.versions: dict[str, str] = self._ask(
                cmd="start",
                folder=str(folder.resolve()),
                block_bytes=block_bytes,
                num_blocks=num_blocks,
                seed=seed,
            )["versions"]
        except BaseException:
            self.close()
            raise

    def put(self, backend: Backend) -> float:
        """Seconds to put all blocks, after what the last put has left was deleted."""
        return float(self._ask(cmd="put", backend=backend)["seconds"])

    def get(self, backend: Backend) -> float:
        """Seconds to get all blocks into the pool; raises unless every byte is right."""
        return float(self._ask(cmd="get", backend=backend)["seconds"])

    def close(self) -> None:
        """End the process; its files stay in the folder."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if not process.stdin.closed:
            process.stdin.close()  # the server ends with its input
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> "LmcacheRival":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self._process.stdout.readline()
        if not line:
            raise RivalError(f"LMCache ended at {request['cmd']!r}; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RivalError(f"LMCache failed at {request['cmd']!r}: {answer['error']}")
        return answer
