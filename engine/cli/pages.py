"""``quire pages``: every page that is not free, on every worker."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

import grpc

from engine.errors import PeerUnavailable
from engine.serving.channels import open_channel
from engine.serving.status import from_rpc_error
from engine.state import read_up_state, state_dir
from quire.v1 import admin_pb2 as pb
from quire.v1 import admin_pb2_grpc

TIMEOUT_S = 10.0
_COUNTS = ("total", "free", "filling", "sealed", "quarantined", "cached_only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", action="append", help="workers (default: `quire up`'s)"
    )
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    endpoints = options.endpoint or _known_endpoints()
    workers = asyncio.run(_ask_all(endpoints))
    if options.json:
        print(json.dumps({"workers": workers}))
    else:
        for worker in workers:
            _print_worker(worker)
    return 1 if any("error" in worker for worker in workers) else 0


def _known_endpoints() -> list[str]:
    state = read_up_state(state_dir())
    if state is None:
        raise PeerUnavailable("no worker is known: start some with `quire up` or give --endpoint")
    return [service.endpoint for service in state.services]


async def _ask_all(endpoints: list[str]) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*[_ask(endpoint) for endpoint in endpoints]))


async def _ask(endpoint: str) -> dict[str, Any]:
    """State and pages of one worker, or why there are none."""
    async with open_channel(endpoint, "control") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            state = await stub.GetState(pb.GetStateRequest(), timeout=TIMEOUT_S)
            pages = await stub.ListPages(pb.ListPagesRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return {"endpoint": endpoint, "error": str(from_rpc_error(error))}
    return {
        "endpoint": endpoint,
        "role": state.role,
        "state": state.state,
        "boot_id": state.boot_id.hex(),
        "counts": {name: getattr(pages.counts, name) for name in _COUNTS},
        "pages": [_page(page) for page in pages.pages],
    }


def _page(page: pb.PageRecord) -> dict[str, Any]:
    return {
        "slot": page.slot,
        "generation": page.generation,
        "state": page.state,
        "owners": list(page.owners),
        "readers": page.num_readers,
        "writers": page.num_writers,
        "leases": page.num_leases,
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
    counts = ", ".join(f"{value} {name}" for name, value in worker["counts"].items())
    print(f"{worker['role']} {worker['endpoint']} boot {worker['boot_id']}: {counts}")
    for page in worker["pages"]:
        print(
            f"  slot {page['slot']:>5} gen {page['generation']:>4} {page['state']:<11} "
            f"{page['tokens']:>3} tokens {page['held_s']:>9.1f} s  {page['reason']}"
        )
