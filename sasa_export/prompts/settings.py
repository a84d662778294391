"""What may stand before or around a request: a greeting, turns, a system prompt, small talk (settings.toml)."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from sasa_export.prompts.prompt import Prompt

Turns = tuple[tuple[str, str], ...]  # a role and a text each
SETTINGS = ("greeting", "one turn", "several turns", "refused turn", "system prompt", "small talk", "mixed")


def in_setting(prompt: Prompt, rng: Random) -> Prompt:
    """The same request in one of `SETTINGS`."""
    setting = rng.choice(SETTINGS)
    if setting == "small talk":
        text = rng.choice(_texts()["wrapped"]).replace("{request}", prompt.prompt)
        return replace(prompt, prompt=text, question=prompt.question or prompt.prompt, setting=setting)
    greeting, harmless, refused = (_texts()[name] for name in ("greetings", "harmless", "refused"))
    system = (("system", rng.choice(_texts()["systems"])),)
    before = {
        "greeting": lambda: _turns(rng.choice(greeting)),
        "one turn": lambda: _turns(rng.choice(harmless)),
        "several turns": lambda: _turns(*rng.sample(harmless, rng.randint(2, 3))),
        "refused turn": lambda: _turns(rng.choice(refused)),
        "system prompt": lambda: system,
        "mixed": lambda: system + _turns(rng.choice(greeting), *rng.sample(harmless, rng.randint(0, 2))),
    }[setting]()
    return replace(prompt, before=before, setting=setting)


def picture_in_an_earlier_turn(prompt: Prompt, rng: Random) -> Prompt:
    """The same prompt, its picture in an earlier turn."""
    before = _turns(rng.choice(_texts()["shown"]))
    return replace(prompt, before=before, setting="picture in an earlier turn", picture_first=True)


def _turns(*pairs: list[str]) -> Turns:
    return tuple(turn for said, answered in pairs for turn in (("user", said), ("assistant", answered)))


@functools.cache
def _texts() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("settings.toml").read_text(encoding="utf-8"))
