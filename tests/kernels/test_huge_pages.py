import mmap

import pytest

from kernels.huge_pages import ask_for_huge_pages, private_memory


def test_private_memory_is_zero_and_writable() -> None:
    memory = private_memory(3 << 20)
    assert memory[:4096] == bytes(4096)
    memory[-1] = 7
    assert memory[-1] == 7


def test_a_kernel_without_huge_pages_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = mmap.mmap(-1, 4096)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 1 << 20)  # advice that no kernel knows
    with pytest.raises(OSError, match="Invalid"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    ask_for_huge_pages(mapping)
