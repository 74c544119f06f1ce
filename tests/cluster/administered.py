"""The administration of real replicas of a tiny model, and its routes, for the tests of both."""

import random
from contextlib import asynccontextmanager

import httpx

from actors.dispatch import RoutedChunk
from actors.engine import GenerationRequest, Receipt, SamplingParams
from cluster.cache_admin import CacheAdmin
from cluster.config import ServeConfig
from cluster.endpoint.access import Access
from cluster.endpoint.api import create_api
from cluster.endpoint.keys import KeysDocument, new_key
from cluster.endpoint.service import Endpoint
from tests.tiny_replicas import BLOCK

PROMPT = tuple(random.Random(0).choices(range(3, 250), k=4 * BLOCK + 1))


class Setup:
    """Replicas and their administration."""

    def __init__(self, replicas) -> None:
        self.replicas = replicas
        self.admin = CacheAdmin(self._find)

    async def _find(self):
        return self.replicas

    async def ask(self, index: int, name: str, prompt=PROMPT) -> Receipt:
        """Ask one replica, and have what it saves written."""
        request = GenerationRequest(name, prompt, SamplingParams(2, ignore_eos=True))
        answer = await self.replicas[index].answer(request)
        assert await self.replicas[index].flush(20)
        return answer.receipt

    async def reason(self, name: str) -> str:
        (explained,) = await self.admin.explain(name)
        return explained.verdict.reason


class OneReplica:
    """Dispatches everything to one replica."""

    def __init__(self, replica) -> None:
        self._replica = replica

    async def generate(self, request):
        async for chunk in self._replica.replica.generate(request):
            yield RoutedChunk(chunk, self._replica.name, ttft_s=0.0)


class TokenPerByte:
    """Encodes texts as the tiny models do."""

    def text(self, text, add_special_tokens=True):
        return tuple(byte + 3 for byte in text.encode())


def keys() -> tuple[dict[str, str], KeysDocument]:
    made = {name: new_key() for name in ("admin", "user")}
    listed = [
        {"id": key_id, "tenant": name, "sha256": digest, "admin": name == "admin"}
        for name, (_, key_id, digest) in made.items()
    ]
    tenants = {name: {"salt": f"salt of {name}"} for name in made}
    return {name: key for name, (key, *_) in made.items()}, KeysDocument(
        tenants=tenants, keys=listed
    )


@asynccontextmanager
async def routes(setup, document, **serve):
    """A client of the routes, over two replicas."""
    async with setup({}, {}) as both:
        endpoint = Endpoint(
            model="tiny",
            config=ServeConfig(**serve),
            encoder=TokenPerByte(),
            dispatcher=OneReplica(both.replicas[0]),
            router=None,
            access=Access(document),
        )
        api = create_api(endpoint)
        api.state.cache_admin = both.admin
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://kvcommons") as client:
            client.app = api
            yield both, client
