"""Fixtures that share the tiny random models among all tests of a session."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

# Tiny matrices gain nothing from threads, and parallel test runs would fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **options)`: the directory of a tiny model, built once per session.

    Tests share it, so they copy it before they write into it.
    """

    @cache
    def built(family: str, options: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        return tiny.build(family, directory, **json.loads(options))

    def get(family: str, **options: Any) -> Path:
        # Serialised, since an option such as a list cannot be a cache key itself.
        return built(family, json.dumps(options, sort_keys=True))

    return get


@pytest.fixture(scope="session")
def stock(tiny_model: Callable[..., Path]) -> Callable[..., tuple[PreTrainedModel, ProcessorMixin]]:
    """`stock(family, **options)`: the stock model and processor of `tiny_model`'s directory.

    Tests share them, so they leave both as they are.
    """

    @cache
    def loaded(directory: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
        model = AutoModelForImageTextToText.from_pretrained(directory).eval()
        return model, AutoProcessor.from_pretrained(directory)

    return lambda family, **options: loaded(tiny_model(family, **options))
