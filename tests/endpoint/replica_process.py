"""A replica in a process of its own, to be killed: no Ray, the real engine and socket."""

import asyncio
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # for the fork server
from transformers.models.llama import modeling_llama  # noqa: F401

from actors.config import ReplicaConfig
from actors.engines.torch.build import build_torch_engine  # noqa: F401
from actors.replica import EngineReplica
from actors.wire.server import Address

HOST = "127.0.0.1"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.endpoint.replica_process"])


@dataclass
class ReplicaProcess:
    """Start it, kill it, start it again; `find` gives its address."""

    config: ReplicaConfig
    process: Any = None
    address: Address | None = None
    num_kills: int = field(default=0)

    def start(self) -> None:
        ours, theirs = _context.Pipe()
        self.process = _context.Process(target=_main, args=(self.config, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert ours.poll(120), "the replica did not start"
        self.address = ours.recv()

    def kill(self) -> None:
        if not self.process.is_alive():
            return
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL
        self.num_kills += 1

    async def find(self) -> Address:
        assert self.address is not None
        return self.address


def _main(config: ReplicaConfig, pipe: Any) -> None:
    async def serve() -> None:
        replica = EngineReplica(config)
        await replica.ready()
        pipe.send(await replica.listen(HOST))
        await asyncio.Event().wait()

    asyncio.run(serve())
