"""No op touches a byte beyond the arrays it is given, on any instruction set.

Every array an op is given ends right before, then begins right after a page that nobody may touch,
and what it writes has the bits it has in ordinary memory. Each op runs in a child process, so that
reaching too far ends a child and not the tests.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _native
from tests.kernels.guarded_ops import CASES
from tests.kernels.guarded_run import TOO_FAR, Ending

ROOT = Path(__file__).parents[2]
# They take no array, or keep it for the ops that read it.
WITHOUT_ARRAYS = {
    "Ahead",
    "Matrix",
    "SuffixAutomaton",
    "SuffixReader",
    "fetch_ahead",
    "isa",
    "make_matrix",
    "num_threads",
    "peak_ops",
    "peak_read",
    "select_isa",
    "set_fetch_ahead",
    "set_num_threads",
    "supported_isas",
}


@pytest.fixture(scope="module")
def endings() -> dict[tuple[str, str], Ending]:
    program = [sys.executable, "-X", "faulthandler", "-m", "tests.kernels.guarded_run"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = [Ending(**fields) for fields in json.loads(done.stdout)]
    return {(ending.name, ending.isa): ending for ending in found}


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("op", CASES)
def test_an_op_stays_within_its_arrays(endings, op, isa):
    ending = endings[op, isa]
    assert ending.status != -signal.SIGSEGV, f"reached too far\n{ending.said}"
    assert ending.status == 0, ending.said


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("name", TOO_FAR)
def test_an_op_that_reaches_one_element_too_far_is_caught(endings, name, isa):
    ending = endings[name, isa]
    assert ending.status == -signal.SIGSEGV, ending.said


def test_every_native_op_is_run_beside_guard_pages():
    callables = {name for name in vars(_native) if callable(getattr(_native, name))}
    ops = {name for name in callables if not name.startswith("_")}
    assert ops - WITHOUT_ARRAYS == set(CASES)
