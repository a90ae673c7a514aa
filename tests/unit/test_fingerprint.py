"""What two workers of different fingerprints can do with each other's pages."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from kvstore.fingerprint import Compatibility, LayoutFingerprint
from kvstore.prefix_hash import PrefixHasher

OURS = LayoutFingerprint(
    model_digest="00" * 16,
    numerics="int8/bf16/1",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    page_size=32,
    kv_dtype="bf16",
    layout_id="k16t_vtd",
)
CHANGES = {
    "model_digest": ("11" * 16, Compatibility.INCOMPATIBLE),
    "numerics": ("int4/bf16/1", Compatibility.FOREIGN),
    "num_layers": (31, Compatibility.INCOMPATIBLE),
    "num_kv_heads": (1, Compatibility.INCOMPATIBLE),
    "head_dim": (128, Compatibility.INCOMPATIBLE),
    "page_size": (16, Compatibility.CONVERTIBLE),
    "kv_dtype": ("fp32", Compatibility.FOREIGN),
    "layout_id": ("ktd_vtd", Compatibility.CONVERTIBLE),
}


def test_equal_fingerprints_are_equal() -> None:
    assert OURS.compatibility(replace(OURS)) is Compatibility.EQUAL
    assert OURS.differences(replace(OURS)) == ""


@pytest.mark.parametrize("field", [field.name for field in fields(LayoutFingerprint)])
def test_every_field_has_a_say(field: str) -> None:
    value, expected = CHANGES[field]
    theirs = replace(OURS, **{field: value})
    assert theirs.digest != OURS.digest
    assert OURS.compatibility(theirs) is theirs.compatibility(OURS) is expected
    told = OURS.differences(theirs)
    assert f"{field}: {getattr(OURS, field)} here, {value} there" in told
    assert OURS.digest.hex() in told
    assert theirs.digest.hex() in told


def test_the_worst_difference_decides() -> None:
    ordered = replace(OURS, page_size=16, layout_id="ktd_vtd")
    assert OURS.compatibility(ordered) is Compatibility.CONVERTIBLE
    foreign = replace(ordered, kv_dtype="fp32", numerics="int8/fp32/1")
    assert OURS.compatibility(foreign) is Compatibility.FOREIGN
    assert OURS.compatibility(replace(foreign, head_dim=1)) is Compatibility.INCOMPATIBLE


def test_only_a_setting_makes_foreign_pages_readable_and_nothing_makes_another_models() -> None:
    readable = {
        each: (each.readable(allow_foreign=False), each.readable(allow_foreign=True))
        for each in Compatibility
    }
    assert readable == {
        Compatibility.EQUAL: (True, True),
        Compatibility.CONVERTIBLE: (True, True),
        Compatibility.FOREIGN: (False, True),
        Compatibility.INCOMPATIBLE: (False, False),
    }


def test_foreign_numbers_have_names_that_neither_end_uses() -> None:
    theirs = replace(OURS, kv_dtype="fp32", numerics="int8/fp32/1")
    held = OURS.holding(theirs)
    assert len({OURS.digest, theirs.digest, held.digest}) == 3
    tokens = range(64)
    names = [
        set(PrefixHasher("t", each.digest, 32).full_pages(tokens)) for each in (OURS, theirs, held)
    ]
    assert not names[0] & names[2]
    assert not names[1] & names[2]
    own = PrefixHasher("t", OURS.digest, 32)
    assert own.under(held.digest).full_pages(tokens) == PrefixHasher(
        "t", held.digest, 32
    ).full_pages(tokens)
