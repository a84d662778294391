"""How fuzz tests try: a few inputs by default, and as many as `SASA_FUZZ` says in `make fuzz`."""

import os
from typing import Any

from hypothesis import HealthCheck, settings


def examples(few: int) -> settings:
    """The same `few` inputs each time, or fresh ones, as many as the environment names."""
    return settings(
        max_examples=int(os.environ.get("SASA_FUZZ", few)), deadline=None, database=None,
        derandomize="SASA_FUZZ" not in os.environ,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


def judged(ids: list[int], sasa: dict[str, Any]) -> int:
    """How many tokens of a text its verdict reads: to its last generation prompt, unless that answer has ended."""
    opening, ends = sasa["generation_prompt_ids"], sasa["turn_token_ids"]
    opened = max((end for end in range(len(ids) + 1) if ids[:end][-len(opening) :] == opening), default=0)
    return opened if opened and not set(ids[opened:]) & set(ends) else len(ids)
