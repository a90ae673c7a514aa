"""Values of the page index are of the right form or are not made; and what the package imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from kvstore.fingerprint import LayoutFingerprint
from kvstore.index import HandoverRecord, HandoverState, WorkerLoad, WorkerRecord
from kvstore.index.memory import SWEEP_INTERVAL_S, MemoryPageIndex

ID = "0f" * 16
LOAD = WorkerLoad(0, 1, 2, 3, 4)
WORKER = WorkerRecord(ID, "prefill", "127.0.0.1:50051", ID, "smollm2", LOAD, "serving")
HANDOVER = HandoverRecord(ID, 1, HandoverState.OFFERED, ID, ID, 3, 2.5)


@pytest.mark.parametrize(
    "endpoint",
    ["localhost:1", "pod-3.prefill.svc.cluster.local:65535", "10.0.0.1:80", "[fe80::1]:5"],
)
def test_hosts_and_addresses_with_a_port_are_endpoints(endpoint):
    assert replace(WORKER, endpoint=endpoint).endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:port",
        "unix:/tmp/s",
        "dns:///host:80",
        "a b:1",
        "a:1\n",
        "u@h:1",
    ],
)
def test_anything_a_resolver_might_follow_elsewhere_is_no_endpoint(endpoint):
    with pytest.raises(ValueError, match="endpoint"):
        replace(WORKER, endpoint=endpoint)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boot_id", "0F" * 16),
        ("boot_id", "0f" * 15),
        ("boot_id", ID + "\n"),
        ("boot_id", b"0f" * 16),
        ("fingerprint", "}" * 32),
        ("role", "router"),
        ("state", ""),
        ("model", "m" * 257),
        ("model", None),
        ("load", None),
    ],
)
def test_worker_of_the_wrong_form_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(WORKER, **{field: value})


LAYOUT = LayoutFingerprint("00" * 16, "int8/bf16/1", 30, 3, 64, 32, "bf16", "k16t_vtd")


@pytest.mark.parametrize(
    ("field", "value"),
    [("page_size", "32"), ("page_size", 0), ("num_layers", 2**53), ("kv_dtype", 1)],
)
def test_layout_of_the_wrong_form_is_refused_by_field(field, value):
    layout = replace(LAYOUT, **{field: value})
    with pytest.raises(ValueError, match=f"layout.{field}"):
        replace(WORKER, fingerprint=layout.digest.hex(), layout=layout)


def test_layout_of_another_fingerprint_is_refused():
    replace(WORKER, fingerprint=LAYOUT.digest.hex(), layout=LAYOUT)
    with pytest.raises(ValueError, match="layout"):
        replace(WORKER, layout=LAYOUT)


@pytest.mark.parametrize(
    "field", ["running", "waiting", "queued_tokens", "free_pages", "total_pages"]
)
@pytest.mark.parametrize("value", [-1, 2**53, 1.0, True, None])
def test_load_of_the_wrong_form_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(LOAD, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", "{0f}" * 8),
        ("attempt", 0),
        ("attempt", 2**32),
        ("prefill_boot_id", ""),
        ("decode_boot_id", "x"),
        ("num_pages", -1),
        ("remaining_s", -0.1),
        ("remaining_s", float("nan")),
        ("remaining_s", float("inf")),
    ],
)
def test_handover_of_the_wrong_form_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(HANDOVER, **{field: value})


def test_records_cannot_be_changed():
    for record, field in ((WORKER, "state"), (LOAD, "running"), (HANDOVER, "attempt")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, getattr(record, field))
        assert not hasattr(record, "__dict__")


async def test_memory_index_lets_go_of_what_expired_without_being_asked_for_it():
    now = 0.0
    index = MemoryPageIndex(lambda: now)
    await index.register(WORKER, 1.0)
    await index.publish(ID, [bytes(16)], ID, 1.0)
    await index.offer_handover(HANDOVER, 1.0)
    now = SWEEP_INTERVAL_S
    await index.publish(ID, [bytes(15) + b"1"], ID, 1.0)
    assert not index._workers
    assert not index._handovers
    assert len(index._holders) == 1


def test_contract_and_memory_index_import_neither_redis_nor_torch():
    program = (
        "import sys, kvstore.index, kvstore.index.memory\n"
        "print({'redis', 'torch', 'grpc', 'numpy', 'engine'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
