"""The rivals as methods of a comparison."""

from pathlib import Path

import torch

from benchmarks.cases.rounds import Method, Moves, Payload
from benchmarks.rivals.lmcache import Backend, LmcacheRival
from benchmarks.rivals.s3_clients import S3fsObjects
from benchmarks.rivals.s3_server import S3Server
from benchmarks.rivals.torch_files import TorchFiles


class Lmcache(Method):
    """One of LMCache's back ends; in a process of its own, with the same bytes."""

    def __init__(self, rival: LmcacheRival, backend: Backend) -> None:
        super().__init__(f"LMCache {backend}", None)
        self._rival = rival
        self._backend = backend

    def put(self) -> float:
        return self._rival.put(self._backend)

    def get(self) -> float:
        return self._rival.get(self._backend)


class TorchSave(Method):
    """A file for each block by `torch.save`, in this process."""

    def __init__(self, folder: Path, payload: Payload) -> None:
        super().__init__("torch.save", None)
        torch.set_num_threads(1)  # its teams of threads are slower as soon as a core is busy
        self._files = TorchFiles(payload, folder)

    def put(self) -> float:
        return self._files.put()

    def get(self) -> float:
        return self._files.get()


class S3fs(Moves):
    """An object for each block through s3fs, `at_once` of them in flight."""

    def __init__(self, server: S3Server, payload: Payload, at_once: int) -> None:
        super().__init__(f"s3fs, {at_once} at once", payload)
        self._objects = S3fsObjects(server, at_once)
        self._names = [f"{at_once}-{block}" for block in range(payload.num_blocks)]
        self._blocks = range(payload.num_blocks)

    def _put(self) -> None:
        self._objects.put(self._names, self.payload.payloads(self._blocks))

    def _get(self) -> None:
        self._objects.get(self._names, self.payload.targets(self._blocks))
