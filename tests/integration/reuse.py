"""What the tests of reuse across workers share: prompts, and ways to look at the services."""

from __future__ import annotations

from collections.abc import Sequence

from engine.local import AsyncLocalEngine
from engine.sampling_params import SamplingParams
from kvstore.prefix_hash import PrefixHasher
from tests.integration.cluster import Node

PAGE = 16
LONG = list(range(200)) * 3
NUM_PAGES = (len(LONG) - 1) // PAGE
PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=20, logprobs=1)


async def expected_tokens(prompt: Sequence[int] = LONG) -> tuple[int, ...]:
    """The prompt's tokens in one process without services."""
    async with AsyncLocalEngine("hash", page_size=PAGE) as engine:
        (completion,) = await engine.generate([list(prompt)], PARAMS)
        return completion.token_ids


async def answer(node: Node, prompt: Sequence[int] = LONG, **options: str) -> tuple[int, ...]:
    """The node's tokens for the prompt."""
    async with node.client(**options) as client:
        (completion,) = await client.generate([list(prompt)], PARAMS)
        return completion.token_ids


async def published(node: Node, to: Node) -> None:
    """The index has been told of every page the node keeps, and ``to`` knows the node."""
    registration = node.worker._registration
    assert registration is not None
    await registration.beat(all_pages=True)
    await to.worker._workers.refresh()  # type: ignore[attr-defined]


def page_names(node: Node, prompt: Sequence[int] = LONG, tenant: str = "") -> list[bytes]:
    """Names of the prompt's full pages that can be shared."""
    hasher = PrefixHasher(tenant, node.core.fingerprint.digest, PAGE)
    return hasher.full_pages(prompt[: len(prompt) - 1])


def counted(node: Node, name: str) -> dict[str, int]:
    """A counter of the node's metrics by its label, or under "" if it has none."""
    (family,) = getattr(node.worker.metrics, name).collect()
    return {
        next(iter(sample.labels.values()), ""): int(sample.value)
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def num_computed(node: Node) -> int:
    """Rows of prompts that the node has put through its model."""
    return node.core.totals.prompt_rows
