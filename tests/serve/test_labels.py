"""Eight clients generate, update, abort and demand versions at random: every token is its label's, no fence is passed.

The fake engine's tokens are a function of the weight bytes that it holds in the step that samples them.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
import torch

from rolloutd import AsyncRolloutClient, RolloutClient, SamplingParams
from rolloutd.errors import StaleWeights, UpdateConflict
from rolloutd.outputs import CompletionOutput
from rolloutd.serve.spawn import Daemon
from rolloutd.weights.tensors import bytes_of
from tests.fakes import Orders, expected_tokens, weights_digest

NUM_CLIENTS, NUM_OPERATIONS = 8, 1000


@dataclass
class History:
    """What happened, to be judged when all is over."""

    served: dict[int, str] = field(default_factory=dict)
    """Version -> digest of its bytes, as its pusher knows them."""
    drawn: list[tuple[list[int], int, CompletionOutput, int]] = field(default_factory=list)
    """Prompt, seed, completion, and the version that was demanded."""
    refused: int = 0
    conflicts: int = 0
    newest: int = 0


async def generate(client: AsyncRolloutClient, rng: random.Random, history: History) -> None:
    order = Orders.SLOW if rng.random() < 0.1 else rng.randrange(800)
    prompt, seed, demanded = [order, rng.randrange(800)], rng.randrange(1000), history.newest
    params = SamplingParams(n=rng.randint(1, 3), max_tokens=rng.randint(1, 6), seed=seed)
    stream = client.stream([prompt], params, min_version=demanded)
    gives_up = rng.random() < 0.2
    async for _, completion in stream:
        history.drawn.append((prompt, seed, completion, demanded))
        if gives_up:
            break
    await stream.aclose()


async def push(client: AsyncRolloutClient, rng: random.Random, history: History) -> None:
    tensor = torch.randn(16, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    try:
        update = await client.update_weights({"a": tensor}, transport=rng.choice(["inline", "auto"]))
    except UpdateConflict:
        history.conflicts += 1
        return
    history.served[update.version] = weights_digest({"a": bytes(bytes_of(tensor))})
    history.newest = max(history.newest, update.version)


async def demand_too_much(client: AsyncRolloutClient, rng: random.Random, history: History) -> None:
    with pytest.raises(StaleWeights, match="or newer"):
        await client.generate([[1, 2]], SamplingParams(max_tokens=2), min_version=history.newest + 100_000)
    history.refused += 1


async def life(address: str, seed: int, history: History) -> None:
    rng = random.Random(seed)
    async with AsyncRolloutClient(address) as client:
        for _ in range(NUM_OPERATIONS // NUM_CLIENTS):
            operation = rng.choices([generate, push, demand_too_much], [6, 3, 1])[0]
            await operation(client, rng, history)
            if rng.random() < 0.05:
                await client.abort()


def test_no_token_has_another_versions_label(daemon: Daemon, client: RolloutClient) -> None:
    history = History(newest=client.health().weight_version)

    async def run() -> None:
        await asyncio.gather(*(life(daemon.address, seed, history) for seed in range(NUM_CLIENTS)))

    first = client.update_weights({"a": torch.zeros(16)})
    history.served[first.version] = weights_digest({"a": bytes(64)})
    history.newest = first.version
    asyncio.run(asyncio.wait_for(run(), 120.0))

    num_tokens = num_mixed = 0
    for prompt, seed, completion, demanded in history.drawn:
        versions = completion.weight_versions
        assert versions == sorted(versions)
        assert min(versions, default=demanded) >= demanded, "the fence was passed"
        for at, (token, version) in enumerate(zip(completion.token_ids, versions, strict=True)):
            digest = history.served[version]
            assert token == expected_tokens(digest, prompt, seed, completion.index, at + 1)[at]
        num_tokens += len(versions)
        num_mixed += len(set(versions)) > 1
    assert num_tokens > 1000
    # How many depends on who comes first; that there are some is what makes this a test.
    assert num_mixed > 3, "updates fell between the steps of running sequences"
    assert len(history.served) > 30
    assert history.refused > 50
