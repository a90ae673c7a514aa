"""Frames of a handover land in any order, once each, and only where they were asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from kernels.layout import PageLayout
from kvstore.landing import Landing, LandingError
from kvstore.memory import PageDigests, PageMemory
from kvstore.page import Commit, PageFrame, PageIdentity, PageReference, digest_of
from kvstore.prefix_hash import PrefixHasher
from kvstore.transports import StreamTransport, receive

LAYOUT = PageLayout(num_layers=13, num_kv_heads=1, head_dim=16, page_size=16)
FINGERPRINT, OWNER = bytes(range(16)), b"o" * 16
HASHER = PrefixHasher("", FINGERPRINT, 16)
PROMPT = list(range(60))  # pages are of 59 tokens: three full ones and one of 11
FIRST = 1


class Sender:
    """A pool with the prompt's pages in it."""

    def __init__(self) -> None:
        self.memory = PageMemory(LAYOUT, 8)
        self.memory.bytes.random_(generator=None)
        self.names = HASHER.all_pages(PROMPT[:59])
        digests = PageDigests(self.memory)
        self.frames = []
        seals = []
        for index in range(FIRST, 4):
            reference = PageReference(OWNER, 7 - index, 3, self.names[index], FINGERPRINT)
            identity = PageIdentity(reference, index, min(16, 59 - 16 * index))
            groups = range(self.memory.groups.count)
            found = [digests.of(identity, group) for group in groups]
            seals.append(digest_of(found))
            self.frames += [
                PageFrame(
                    identity,
                    group,
                    len(groups),
                    bytes(self.memory.group(7 - index, group)),
                    found[group],
                )
                for group in groups
            ]
        self.commit = Commit(4, 59, digest_of(seals), self.names[-1])


@pytest.fixture(scope="module")
def sender() -> Sender:
    return Sender()


def landing_into(memory: PageMemory) -> Landing:
    return Landing(memory, HASHER, PROMPT, FIRST, (4, 0, 2), FINGERPRINT, OWNER)


async def land(landing: Landing, frames: list[PageFrame]) -> None:
    source = await StreamTransport().connect(b"", OWNER, LAYOUT)
    for frame in frames:
        await receive([frame], landing, source)


def test_a_page_is_cut_into_about_six_groups_of_whole_layers_or_more_if_it_is_large() -> None:
    groups = PageMemory(LAYOUT, 1).groups
    assert [groups.layers_through(group) for group in range(groups.count)] == [3, 6, 9, 12, 13]
    assert sum(groups.num_bytes(group) for group in range(groups.count)) == LAYOUT.page_bytes
    assert PageMemory(replace(LAYOUT, num_layers=2), 1).groups.count == 2
    large = PageMemory(replace(LAYOUT, num_layers=16, num_kv_heads=64, page_size=128), 1).groups
    assert large.count == 16
    assert large.num_bytes(0) == 1 << 20


@pytest.mark.parametrize("seed", range(5))
async def test_frames_land_in_any_order(sender: Sender, seed: int) -> None:
    memory = PageMemory(LAYOUT, 5)
    landing = landing_into(memory)
    frames = random.Random(seed).sample(sender.frames, len(sender.frames))
    await land(landing, frames)
    landing.finish(sender.commit)
    assert landing.num_landed_pages == 3
    for slot, theirs in ((4, 6), (0, 5), (2, 4)):
        assert bytes(memory.bytes[slot].numpy()) == bytes(sender.memory.bytes[theirs].numpy())


async def test_a_commit_before_the_last_layer_group_is_refused(sender: Sender) -> None:
    landing = landing_into(PageMemory(LAYOUT, 5))
    await land(landing, sender.frames[:-1])
    with pytest.raises(LandingError) as caught:
        landing.finish(sender.commit)
    assert caught.value.reason == "incomplete"


def with_reference(frame: PageFrame, **changes: object) -> PageFrame:
    reference = replace(frame.identity.reference, **changes)  # type: ignore[arg-type]
    return replace(frame, identity=replace(frame.identity, reference=reference))


WRONG: dict[str, tuple[Callable[[PageFrame], PageFrame], str]] = {
    "twice": (lambda frame: frame, "order"),
    "a page before": (
        lambda frame: replace(frame, identity=replace(frame.identity, page_index=0)),
        "order",
    ),
    "a page behind": (
        lambda frame: replace(frame, identity=replace(frame.identity, page_index=4)),
        "order",
    ),
    "a group too many": (lambda frame: replace(frame, layer_group=5), "order"),
    "of another cut": (lambda frame: replace(frame, num_layer_groups=4), "layout"),
    "of another generation": (
        lambda frame: with_reference(replace(frame, layer_group=1), generation=4),
        "generation",
    ),
    "of another slot": (
        lambda frame: with_reference(replace(frame, layer_group=1), slot=0),
        "generation",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_frame_that_was_not_asked_for_has_no_place(sender: Sender, name: str) -> None:
    change, reason = WRONG[name]
    landing = landing_into(PageMemory(LAYOUT, 5))
    await land(landing, sender.frames[:1])
    with pytest.raises(LandingError) as caught:
        landing.claim(change(sender.frames[0]))
    assert caught.value.reason == reason


async def test_a_frame_that_promised_its_bytes_elsewhere_has_none_for_a_stream(
    sender: Sender,
) -> None:
    with pytest.raises(LandingError) as caught:
        await land(landing_into(PageMemory(LAYOUT, 5)), [replace(sender.frames[0], payload=None)])
    assert caught.value.reason == "size"


def test_digests_stay_those_of_the_content_that_was_finished(sender: Sender) -> None:
    memory = PageMemory(LAYOUT, 8)
    digests = PageDigests(memory)
    identity = sender.frames[0].identity
    first = digests.of(identity, 0)
    memory.bytes.zero_()
    assert digests.of(identity, 0) == first
    moved = with_reference(sender.frames[0], generation=4).identity
    assert digests.of(moved, 0) != first
