import json
import multiprocessing
import os

import pytest
import torch
from safetensors import safe_open

from engine.model import packed_cache
from engine.model.packed_cache import cache_folder, through_cache
from kernels.packed_matrix import PackedMatrix, pack_floats, pack_rotated_int8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def some_parts():
    generator = torch.Generator().manual_seed(1)
    return {
        "norm": torch.randn(72, generator=generator),
        "layers.0.qkv": pack_rotated_int8(torch.randn(40, 100, generator=generator)),
        "embedding": pack_floats(torch.randn(70, 64, generator=generator), torch.bfloat16),
    }


def never():
    raise AssertionError("built again")


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        if isinstance(part, PackedMatrix):
            assert packed_cache._described(found[name]) == packed_cache._described(part)
            assert torch.equal(found[name].data, part.data)
        else:
            assert torch.equal(found[name], part)


def test_the_second_start_maps_what_the_first_one_built():
    assert_equal(through_cache("d", "int8", some_parts), some_parts())
    assert_equal(through_cache("d", "int8", never), some_parts())


def test_another_model_or_mode_has_a_file_of_its_own():
    built = []
    for digest, mode in (("a", "int8"), ("b", "int8"), ("a", "int4")):
        through_cache(digest, mode, lambda: built.append(1) or some_parts())
    assert len(built) == 3


def test_matrices_start_on_cache_lines():
    parts = through_cache("d", "int8", some_parts)
    assert all(parts[name].data.data_ptr() % 64 == 0 for name in ("layers.0.qkv", "embedding"))


def test_the_file_is_a_safetensors_container(folder):
    through_cache("d", "int8", some_parts)
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("norm"), some_parts()["norm"])
        described = json.loads(file.metadata()["layers.0.qkv"])
    assert described["format"] == "int8"


def test_writing_to_mapped_weights_does_not_reach_the_file():
    through_cache("d", "int8", some_parts)["norm"].zero_()
    assert_equal(through_cache("d", "int8", never), some_parts())


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
def test_a_file_cut_short_is_built_again(folder, keep, caplog):
    through_cache("d", "int8", some_parts)
    (path,) = folder.glob("*.safetensors")
    size = path.stat().st_size
    os.truncate(path, int(keep * size) if 0 < keep < 1 else keep)
    assert_equal(through_cache("d", "int8", some_parts), some_parts())
    assert "packed weights" in caplog.text
    assert path.stat().st_size == size


def test_a_folder_that_cannot_be_written_does_not_stop_a_start(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert_equal(through_cache("d", "int8", some_parts), some_parts())
    assert "not kept" in caplog.text


def test_nothing_is_left_of_a_write_that_fails(folder, monkeypatch):
    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(packed_cache.os, "fsync", full)
    assert_equal(through_cache("d", "int8", some_parts), some_parts())
    assert not list(folder.glob("*.safetensors")) + list(folder.glob("*.partial"))


def test_an_empty_variable_switches_the_cache_off(monkeypatch, folder):
    monkeypatch.setenv("QUIRE_CACHE_DIR", "")
    assert_equal(through_cache("d", "int8", some_parts), some_parts())
    assert not folder.exists()


def test_the_folder_is_that_of_the_user_unless_named():
    assert str(cache_folder({"XDG_CACHE_HOME": "/x"})) == "/x/quire"
    assert str(cache_folder({"QUIRE_CACHE_DIR": "/y", "XDG_CACHE_HOME": "/x"})) == "/y"


def _start(counter, barrier):
    def build():
        with counter.get_lock():
            counter.value += 1
        return some_parts()

    barrier.wait()
    assert_equal(through_cache("d", "int8", build), some_parts())


def test_of_processes_that_start_together_one_builds():
    context = multiprocessing.get_context("spawn")
    counter, barrier = context.Value("i", 0), context.Barrier(3)
    starts = [context.Process(target=_start, args=(counter, barrier)) for _ in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join(60)
    assert [start.exitcode for start in starts] == [0, 0, 0]
    assert counter.value == 1
