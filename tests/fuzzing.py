"""How fuzz tests try: a few inputs by default, and as many as `SASA_FUZZ` says in `make fuzz`."""

import os

from hypothesis import HealthCheck, settings


def examples(few: int) -> settings:
    """The same `few` inputs each time, or fresh ones, as many as the environment names."""
    return settings(
        max_examples=int(os.environ.get("SASA_FUZZ", few)), deadline=None, database=None,
        derandomize="SASA_FUZZ" not in os.environ,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
