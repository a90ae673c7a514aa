import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels import _native, threads
from kernels.linear import cpu_kernel
from tests.kernels.bits import same_bits
from tests.kernels.matrices import KINDS


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_cgroup_v2_quota_of_any_level_counts(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/pod/container\n")
    write(tmp_path, "sys/fs/cgroup/pod/container/cpu.max", "max 100000\n")
    write(tmp_path, "sys/fs/cgroup/pod/cpu.max", "150000 100000\n")
    assert threads.cgroup_quota(tmp_path) == 1.5
    assert threads.allowed_cores(tmp_path) <= 2


def test_a_cgroup_v1_quota_counts(tmp_path):
    write(tmp_path, "proc/self/cgroup", "5:memory:/a\n3:cpu,cpuacct:/a\n")
    write(tmp_path, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert threads.cgroup_quota(tmp_path) == 0.5
    assert threads.allowed_cores(tmp_path) == 1


def test_without_a_quota_the_affinity_mask_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 5})
    assert threads.cgroup_quota(tmp_path) is None
    assert threads.allowed_cores(tmp_path) == 3


def test_the_environment_overrides_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("QUIRE_THREADS", "7")
    assert threads.configured_threads() == 7


@pytest.mark.parametrize("text", ["0", "257", "-1", "two", ""])
def test_a_bad_number_of_threads_in_the_environment_is_refused(monkeypatch, text):
    monkeypatch.setenv("QUIRE_THREADS", text)
    with pytest.raises(ValueError, match=r"QUIRE_THREADS must be in 1\.\.256"):
        threads.configured_threads()


@pytest.mark.parametrize("count", [0, -3, 257])
def test_a_pool_of_no_or_too_many_threads_is_refused(count):
    with pytest.raises(ValueError, match="count must be"):
        threads.set_num_threads(count)


def test_the_pool_can_grow_and_shrink_between_calls():
    x, weight = torch.randn(5, 64), KINDS["f32"](999, 64)
    expected = cpu_kernel.linear(x, weight)
    for count in (1, 4, 2, 8, 1, 3):
        threads.set_num_threads(count)
        assert _native.num_threads() == count
        assert same_bits(cpu_kernel.linear(x, weight), expected)


def test_callers_on_several_threads_take_turns():
    threads.set_num_threads(3)
    x, weights = torch.randn(5, 64), [KINDS["f32"](999, 64) for _ in range(4)]
    expected = [cpu_kernel.linear(x, weight) for weight in weights]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(50):
            results = callers.map(lambda weight: cpu_kernel.linear(x, weight), weights)
            assert all(map(same_bits, results, expected))


WORK = """
import os, torch
from kernels import threads
from kernels.linear.cpu_kernel import linear
from kernels.packed_matrix import pack_floats
threads.set_num_threads(4)
x, weight = torch.ones(3, 64), pack_floats(torch.ones(999, 64), torch.float32)
assert (linear(x, weight) == 64).all()
"""
FORK = """
child = os.fork()
if child == 0:
    threads.set_num_threads(2)
    os._exit(0 if (linear(x, weight) == 64).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (linear(x, weight) == 64).all()
"""


@pytest.mark.parametrize("program", [WORK, WORK + FORK], ids=["exit", "fork"])
def test_a_process_with_a_pool_ends(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
