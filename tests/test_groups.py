"""Tests of one group share a worker, and with it what took long to make."""

import pytest


@pytest.mark.xdist_group("one")
def test_a_group_is_kept_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells groups apart by what it writes behind a test's name."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no workers here")
    assert request.node.nodeid.endswith("@one"), "this pytest-xdist does not group under this pytest"
