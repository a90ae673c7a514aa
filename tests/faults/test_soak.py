"""Half a minute of the soak in every run of the tests; ``make soak`` has the ten minutes."""

from __future__ import annotations

import pytest

from tests.faults.fleet import Fleet
from tests.faults.soak import Soak
from tests.faults.truth import Truth

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHORT_S, LONG_S = 25.0, 60.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "seconds", [SHORT_S, pytest.param(LONG_S, marks=pytest.mark.slow)], ids=["short", "a minute"]
)
async def test_a_soak_ends_without_a_wrong_token_a_hung_request_or_a_lost_page(
    fleet: Fleet, truth: Truth, seconds: float
) -> None:
    found = await Soak(fleet, truth, seed=4).run(seconds)
    assert found.wrong == found.hung == 0
    assert found.ok > 0
