"""Fixtures that share the tiny random models among all tests of a session."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Code of patched directories goes into a cache of this run's own; transformers reads the variable on import.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="sasa-tests-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import oracle  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from cli_steps import offline, write_probe  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin  # noqa: E402

import sasa_export  # noqa: E402
from sasa_export.gate import GateSpec  # noqa: E402
from sasa_export.graph import LayerGraph  # noqa: E402
from sasa_export.models import open_source  # noqa: E402
from sasa_export.models.contents import read_object  # noqa: E402
from sasa_export.options import REACH  # noqa: E402
from sasa_export.probe.file import read_probe  # noqa: E402
from sasa_export.report import Silent  # noqa: E402
from sasa_export.writers.directory import Patch  # noqa: E402

pytest_plugins = ["shared_fixtures"]

# Tiny matrices gain nothing from threads, and parallel test runs would fight over the cores.
torch.set_num_threads(1)


def load(directory: Path | str, **options: Any) -> Any:
    """A patched directory's model, as README loads it."""
    return AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, **options).eval()


def move_weights(model: Any) -> None:
    """Change what a llava says, as training would."""
    torch.manual_seed(0)
    for block in model.model.language_model.layers:
        block.mlp.down_proj.weight.data += torch.randn_like(block.mlp.down_proj.weight)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a guarded family share a worker, which then builds its models once; those that name none take llava."""
    for item in items:
        if "guard" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("xdist_group"):
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            item.add_marker(pytest.mark.xdist_group(parameters.get("family", "llava")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **options)`: the directory of a tiny model, built once per session.

    Tests share it, so they copy it before they write into it.
    """
    return cache(lambda family, **options: tiny.build(family, tmp_path_factory.mktemp(family), **options))


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


@dataclass(frozen=True)
class Guard:
    """A patched tiny model beside the stock model that it was made from, and the probe on whole logits."""

    family: str
    directory: Path
    model: Any
    stock: Any
    processor: ProcessorMixin
    safety: int | None
    semantic: int | None
    weight: Tensor  # (vocabulary,)
    bias: float
    reach: int | None = None  # over how many tokens the lane runs; None: all
    states: Tensor | None = None  # (2 * hidden,), the probe's weights on the normed states of both layers

    @property
    def refusal(self) -> list[int]:
        """The refusal's token ids, end of sequence last."""
        return list(self.model.config.sasa["refusal_token_ids"])

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer, and the padding behind it."""
        settings = self.stock.generation_config
        ends = settings.eos_token_id
        return {settings.pad_token_id, *(ends if isinstance(ends, list) else [ends])}

    def batch(
        self, *, images: bool = True, count: int = 4, seed: int = 1, padding_side: Any = "left"
    ) -> dict[str, Any]:
        """Prompts of different lengths; with `images`, each third row still has none."""
        return dict(tiny.prompts(self.processor, images=images, count=count, seed=seed, padding_side=padding_side))

    def expected(self, inputs: Mapping[str, Any], stock: Any = None) -> Tensor:
        """P(unsafe) of each row (batch,), by the oracle; without layers, by the stock model's own logits.

        Args: stock: in place of its own, one that was treated as a guarded model was.
        """
        stock = stock or self.stock
        if self.safety is None or self.semantic is None:
            logits = oracle.plain_logits(stock, inputs)  # (batch, vocabulary)
        else:
            logits = oracle.lane_logits(stock, inputs, self.safety, self.semantic, self.reach)
        if self.states is None or self.safety is None or self.semantic is None:
            return oracle.unsafe_probability(logits, self.weight, self.bias)  # (batch,)
        read = oracle.normed_states(stock, inputs, (self.safety, self.semantic))  # (batch, 2 * hidden)
        both, weight = torch.cat([logits.float(), read.float()], -1), torch.cat([self.weight, self.states])
        return oracle.unsafe_probability(both, weight, self.bias)  # (batch,)

    def check_answers(self, found: Tensor, expected: Tensor, refused: Tensor) -> None:
        """Fail where a refused row does not say the refusal, or another one not what the stock model says.

        Args: found and expected: (batch, tokens), which end where the longest answer or the limit does; refused:
        (batch,).
        """
        for said, row, refuse in zip(found.tolist(), expected.tolist(), refused.tolist(), strict=True):
            right = self.refusal[: len(said)] if refuse else row
            both = min(len(said), len(right))
            alike = said[:both] == right[:both] and set(said[both:] + right[both:]) <= self.ends
            assert alike, f"{'refused' if refuse else 'allowed'}: {said} instead of {right}"

    @contextmanager
    def halved(self, inputs: Mapping[str, Any]) -> Iterator[Tensor]:
        """The threshold in the middle of a batch's P(unsafe); gives which rows are refused, (batch,), bool."""
        scores = self.expected(inputs)  # (batch,)
        ordered = scores.sort().values  # (batch,)
        middle = len(ordered) // 2
        threshold = float(ordered[middle - 1] + ordered[middle]) / 2
        assert ordered[middle] - ordered[middle - 1] > 1e-3, "the middle scores of this batch are too close"
        with self.at(threshold):
            yield scores >= threshold

    @contextmanager
    def at(self, threshold: float, model: Any = None) -> Iterator[None]:
        """Another threshold in the settings, of a model that was made of this one too, in a `with` block."""
        settings = (model or self.model).config.sasa
        before, settings["threshold"] = settings["threshold"], threshold
        try:
            yield
        finally:
            settings["threshold"] = before


@pytest.fixture(scope="session")
def guard(
    tiny_model: Callable[..., Path], stock: Callable[..., tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Guard]:
    """`guard(family, safety=2, semantic=4, **options)`: a tiny model, patched and loaded once per session.

    `options` are fields of `sasa_export.Options`. Tests share it, so they put back what they change.
    """

    @cache
    def made(family: str, safety: int | None, semantic: int | None, **options: Any) -> Guard:
        directory = tmp_path_factory.mktemp(f"guard-{family}")
        model, processor = stock(family)
        text = model.config.get_text_config()
        weight = torch.randn(text.vocab_size, generator=torch.Generator().manual_seed(7)) / 20  # (vocabulary,)
        bias = 0.1
        capped = getattr(text, "final_logit_softcapping", None)  # then the probe reads the logits themselves
        lane = weight if capped else oracle.folded(model, weight)
        drawn = torch.randn(2 * text.hidden_size, generator=torch.Generator().manual_seed(9)) / 20
        states = None if options.get("projection") == "none" else drawn
        whole = lane if states is None else torch.cat([lane, states])
        probe = write_probe(directory / "probe.safetensors", whole, bias)
        where = {"model": str(tiny_model(family)), "out": directory / "patched", "probe": probe}
        layers = {"safety_layer": safety, "semantic_layer": semantic}
        given: dict[str, Any] = {**where, **layers, "refusal": "I will not help.", "verify": "files", **options}
        sasa_export.patch(sasa_export.Options(**given))
        patched = load(directory / "patched")
        return Guard(
            family, directory / "patched", patched, model, processor, safety, semantic, weight, bias,
            options.get("lane_tokens", REACH), states,
        )  # fmt: skip

    def get(family: str, safety: int | None = 2, semantic: int | None = 4, **options: Any) -> Guard:
        if options.get("projection") == "none":
            safety = semantic = None
        return made(family, safety, semantic, **options)

    return get


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported(patched, opset=23)`: what a patched directory was made from, in ONNX with the same gate, written once
    per session."""
    from sasa_export.onnx.export import export

    @cache
    def made(patched: Path, opset: int, dtype: str) -> Path:
        out = tmp_path_factory.mktemp("onnx")
        source = open_source(json.loads((patched / "sasa-export.json").read_text())["options"]["model"])
        gate = GateSpec.from_json(read_object(patched / "config.json")["sasa"])
        probe = read_probe(sorted(patched.glob("*.safetensors"))[-1], None)
        patch = Patch(patched, source, LayerGraph(()), gate, probe, None, (), "float32", "cpu")
        export(patch, out, opset=opset, dtype=dtype, report=Silent())
        for path in (path for path in patched.glob("sasa-*") if path.name != "sasa-export.json"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, out / path.name)
        return out

    # A cache tells arguments apart by how they are written.
    return lambda patched, opset=23, dtype="float32": made(patched, opset, dtype)


@pytest.fixture(scope="session")
def split(guard: Callable[..., Any]) -> Callable[..., Any]:
    """`split(family, **options)`: a guard whose threshold lies amid its prompts' scores, so that batches are mixed."""

    @cache
    def get(family: str, **options: Any) -> Any:
        first = guard(family, **options)
        prompts = tiny.prompts(first.processor, images=True, count=6, seed=1, padding_side="left")
        scores = first.expected(prompts).sort().values  # (batch,)
        return guard(family, threshold=float(scores[2:4].mean()), **options)

    return get


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`fresh(script, argument)`: what a script prints last, as JSON, in a process where nothing is registered.

    The script finds `argument` in `sys.argv[1]`, as JSON. Nobody answers what it may ask: its input is closed.
    """

    def run(script: str, argument: Any) -> Any:
        scratch = tmp_path_factory.mktemp("fresh")
        command = [sys.executable, "-I", "-c", script, json.dumps(argument)]
        how: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
        environment = {**offline(), "HF_MODULES_CACHE": str(scratch / "modules")}
        result = subprocess.run(command, cwd=scratch, env=environment, **how)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run
