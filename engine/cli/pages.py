"""``quire pages``: every page that is not free, on every worker; and those nobody will free."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc

from engine.cli.page_audit import Finding, Worker, orphans, stale_entries
from engine.errors import PeerUnavailable
from engine.serving.channels import open_channel
from engine.serving.status import from_rpc_error
from engine.state import UpState, read_up_state, state_dir
from kvstore.index import PageEntry, PageIndexError
from quire.v1 import admin_pb2 as pb
from quire.v1 import admin_pb2_grpc

TIMEOUT_S = 10.0
INDEX_TIMEOUT_S = 2.0
LOOK_AGAIN_S = 3.0
_COUNTS = ("total", "free", "filling", "sealed", "quarantined", "cached_only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", action="append", help="workers (default: `quire up`'s)"
    )
    parser.add_argument("--redis", metavar="URL", help="page index (default: `quire up`'s)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check that all pages add up; exit code 1 if they do not, or somebody lost one",
    )
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    state = read_up_state(state_dir())
    endpoints = options.endpoint or _endpoints(state)
    redis = options.redis or ("" if options.endpoint or state is None else state.redis)
    found = asyncio.run(look(endpoints, redis, options.check))
    if options.json:
        print(json.dumps(found.as_json()))
    else:
        found.print()
    return 1 if found.unanswered or (options.check and found.broken) else 0


@dataclass(frozen=True, slots=True)
class Pages:
    """What all workers hold, and what is wrong with it."""

    workers: list[Worker]
    orphans: set[Finding]
    stale_entries: set[Finding]
    index_error: str = ""

    @property
    def unanswered(self) -> bool:
        return any("error" in worker for worker in self.workers)

    @property
    def broken(self) -> bool:
        """Whether pages are lost. A stale entry of the index is not one: it goes by itself."""
        return bool(self.orphans) or any(worker.get("problems") for worker in self.workers)

    def still(self, later: Pages) -> Pages:
        """``later``, with what was wrong before already and still is."""
        return replace(
            later,
            orphans=self.orphans & later.orphans,
            stale_entries=self.stale_entries & later.stale_entries,
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "orphans": [_finding(each) for each in sorted(self.orphans)],
            "stale_entries": [_finding(each) for each in sorted(self.stale_entries)],
            "index_error": self.index_error,
        }

    def print(self) -> None:
        for worker in self.workers:
            _print_worker(worker)
        for kind, findings in (("orphan", self.orphans), ("stale", self.stale_entries)):
            for boot_id, place, problem in sorted(findings):
                print(f"{kind}: {place} of {boot_id}: {problem}")
        if self.index_error:
            print(f"page index: {self.index_error}", file=sys.stderr)


async def look(endpoints: Sequence[str], redis: str = "", check: bool = False) -> Pages:
    """Asks all workers, and the index if there is a URL of one.

    The ends of a handover let go one after the other, and the index is told last: only what is
    wrong at two looks is.
    """
    found = await _look_once(endpoints, redis, check)
    if not found.orphans | found.stale_entries:
        return found
    await asyncio.sleep(LOOK_AGAIN_S)
    return found.still(await _look_once(endpoints, redis, check))


async def _look_once(endpoints: Sequence[str], redis: str, check: bool) -> Pages:
    """The index first: a page that is published in between is no stale entry."""
    entries, error = await _entries(redis)
    workers = await asyncio.gather(*[_ask(endpoint, check) for endpoint in endpoints])
    return Pages(workers, orphans(workers), stale_entries(entries, workers), error)


def _endpoints(state: UpState | None) -> list[str]:
    if state is None:
        raise PeerUnavailable("no worker is known: start some with `quire up` or give --endpoint")
    return [service.endpoint for service in state.services]


async def _entries(redis: str) -> tuple[list[PageEntry], str]:
    """What the index says of pages, and why it said nothing."""
    if not redis:
        return [], ""
    from kvstore.index.redis import RedisPageIndex

    index = RedisPageIndex(redis, timeout_s=INDEX_TIMEOUT_S)
    try:
        return await index.entries(), ""
    except PageIndexError as error:
        return [], str(error)
    finally:
        await index.close()


async def _ask(endpoint: str, check: bool) -> Worker:
    """State and pages of one worker, or why there are none."""
    async with open_channel(endpoint, "control") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            state = await stub.GetState(pb.GetStateRequest(), timeout=TIMEOUT_S)
            pages = await stub.ListPages(pb.ListPagesRequest(), timeout=TIMEOUT_S)
            problems = await _problems(stub) if check else []
        except grpc.aio.AioRpcError as error:
            return {"endpoint": endpoint, "error": str(from_rpc_error(error))}
    return {
        "endpoint": endpoint,
        "role": state.role,
        "state": state.state,
        "boot_id": state.boot_id.hex(),
        "counts": {name: getattr(pages.counts, name) for name in _COUNTS},
        "callers": list(pages.callers),
        "pages": [_page(page) for page in pages.pages],
    } | ({"problems": problems} if check else {})


async def _problems(stub: admin_pb2_grpc.AdminServiceAsyncStub) -> list[str]:
    checked = await stub.CheckPages(pb.CheckPagesRequest(), timeout=TIMEOUT_S)
    return list(checked.problems)


def _finding(finding: Finding) -> dict[str, str]:
    return dict(zip(("boot_id", "page", "problem"), finding, strict=True))


def _page(page: pb.PageRecord) -> dict[str, Any]:
    return {
        "slot": page.slot,
        "generation": page.generation,
        "state": page.state,
        "owners": list(page.owners),
        "readers": page.num_readers,
        "writers": page.num_writers,
        "leases": page.num_leases,
        "lease_holders": list(page.lease_holders),
        "readers_for": list(page.readers),
        "writers_for": list(page.writers),
        "orphan": page.orphan,
        "cached": page.cached,
        "prefix_hash": page.prefix_hash.hex(),
        "tokens": page.num_tokens,
        "held_s": round(page.held_s, 3),
        "reason": page.reason,
    }


def _print_worker(worker: dict[str, Any]) -> None:
    if "error" in worker:
        print(f"{worker['endpoint']}: {worker['error']}", file=sys.stderr)
        return
    for problem in worker.get("problems", ()):
        print(f"broken: {problem}")
    counts = ", ".join(f"{value} {name}" for name, value in worker["counts"].items())
    print(f"{worker['role']} {worker['endpoint']} boot {worker['boot_id']}: {counts}")
    for page in worker["pages"]:
        print(
            f"  slot {page['slot']:>5} gen {page['generation']:>4} {page['state']:<11} "
            f"{page['tokens']:>3} tokens {page['held_s']:>9.1f} s  {page['reason']}"
        )
