"""How fuzz tests try: a few inputs by default, and as many as `SASA_FUZZ` says in `make fuzz`."""

import os

from hypothesis import HealthCheck, settings
from records import note


def examples(few: int) -> settings:
    """The same `few` inputs each time, or fresh ones, as many as the environment names."""
    return settings(
        max_examples=int(os.environ.get("SASA_FUZZ", few)), deadline=None, database=None,
        derandomize="SASA_FUZZ" not in os.environ,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


class Tries:
    """Counts the tries of a fuzz test; `passed`, called behind the last one, notes them for `make fuzz`."""

    def __init__(self, what: str) -> None:
        self.what, self.count = what, 0

    def __call__(self) -> None:
        self.count += 1

    def passed(self) -> None:
        note("faults", group="fuzzing", what=self.what, tried=self.count, of=None, good=True)
