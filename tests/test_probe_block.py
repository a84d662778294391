"""`--probe-block`: the second lane ends before the last block, and all else stays as it is."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import Guard
from onnx_runner import Runner, image_token, positions
from test_every_token import stepwise
from test_feeding import chunkings, feed, last_picture_token
from torch import Tensor

from sasa_export.cli import main

Guards = Callable[..., Guard]

SAFETY, SEMANTIC, BLOCKS = 2, 4, 6
ENDS = [
    2,
    3,
    4,
]  # the projection itself, a block before the semantic layer, and that one; the last block is the default
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llava", "gemma3", "qwen2_5_vl")]
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch(guarded: Guard, *, images: bool = True, count: int = 4) -> dict[str, Any]:
    return dict(tiny.prompts(guarded.processor, images=images, count=count, seed=4, padding_side="left"))


def answers(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(batch, tokens)."""
    said: Tensor = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    return said


@every_family
@pytest.mark.parametrize("end", ENDS)
@torch.no_grad()
def test_the_verdict_is_the_oracles(guard: Guards, family: str, end: int) -> None:
    """However the prompt is fed; refused rows spell the refusal, and allowed ones are the stock model's."""
    guarded = guard(family, probe_block=end)
    inputs = batch(guarded)
    expected = guarded.expected(inputs)  # (batch,)
    whole = guard(family).expected(inputs)  # (batch,)
    assert (expected - whole).abs().max() > 1e-3, "the oracle must see where the lane ends"
    with guarded.halved(inputs) as refused:
        for ends in chunkings(inputs["input_ids"].shape[1], last_picture_token(guarded, inputs), seed=1)[:4]:
            found = feed(guarded, inputs, ends).unsafe_probability  # (batch,)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
        said, plain = answers(guarded.model, inputs), answers(guarded.stock, inputs)
    assert refused.any() and not refused.all()
    assert all(row.tolist() == guarded.refusal[: len(row)] for row in said[refused])
    width = min(said.shape[1], plain.shape[1])
    assert torch.equal(said[~refused, :width], plain[~refused, :width])


@every_family
@pytest.mark.parametrize("end", ENDS)
@torch.no_grad()
def test_every_token(guard: Guards, family: str, end: int) -> None:
    guarded = guard(family, probe_block=end, gate="every-token")
    inputs = batch(guarded, images=False, count=2)
    with guarded.at(2.0):
        output = guarded.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        plain = guarded.stock.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(output, plain)
    found = stepwise(guarded, inputs, plain)  # (batch, steps)
    for step in range(found.shape[1]):
        length = inputs["input_ids"].shape[1] + step
        grown = {"input_ids": plain[:, :length], "attention_mask": torch.ones(2, length, dtype=torch.int64)}
        grown["attention_mask"][:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        if "token_type_ids" in inputs:
            grown["token_type_ids"] = torch.zeros_like(grown["attention_mask"])
        torch.testing.assert_close(found[:, step], guarded.expected(grown), rtol=0.0, atol=1e-5)


@pytest.mark.xdist_group("onnx-llava")
@pytest.mark.parametrize(("end", "gate"), [(3, "prompt"), (2, "every-token")])
@torch.no_grad()
def test_in_onnx(guard: Guards, exported: Callable[..., Path], end: int, gate: str) -> None:
    guarded = guard("llava", probe_block=end, gate=gate)
    directory = exported(guarded.directory)
    runner, inputs = Runner(directory), batch(guarded)
    ids, _ = positions(guarded, inputs)
    runner.prompt({name: value.numpy() for name, value in inputs.items()}, image_token(guarded), ids.numpy())
    assert runner.probability is not None
    np.testing.assert_allclose(runner.probability, guarded.expected(inputs).numpy(), atol=1e-4, rtol=0)
    graph = ir.load(directory / "onnx" / "decoder_model_merged.onnx").graph
    counts = Counter(node.op_type for node in graph.all_nodes())
    assert counts["Attention"] == BLOCKS + end - SAFETY


def test_settings_and_card(guard: Guards) -> None:
    guarded = guard("llava", probe_block=3)
    lane = [node["index"] for node in guarded.model.config.sasa["graph"] if node["op"] == "lane_block"]
    assert lane == [3]
    card = (guarded.directory / "README.md").read_text()
    assert "6 + 1 blocks run, 1.17 times the original's" in card and "block 3 runs once more" in card
    card = (guard("llava", probe_block=2).directory / "README.md").read_text()
    assert "6 + 0 blocks run, 1.00 times" in card and "no block runs on the result" in card


def test_another_end_in_the_settings_does_not_load(guard: Guards) -> None:
    from sasa_export.runtime.settings import check_settings

    sasa = dict(guard("llava", probe_block=3).model.config.sasa)
    assert check_settings(sasa)
    for wrong in (None, 4, 2, 6, -1, "3"):
        with pytest.raises(ValueError, match=r"config\.sasa"):
            check_settings({**sasa, "probe_block": wrong})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--probe-block", "1", "--safety-layer", "2", "--semantic-layer", "4"], "--probe-block is 1; it must be from"),
        (["--probe-block", "6", "--safety-layer", "2", "--semantic-layer", "4"], "to the last block, 5"),
        (["--probe-block", "3", "--projection", "none"], "has no second lane"),
        (["--probe-block", "3", "--safety-layer", "auto"], "Give both layers"),
    ],
)
def test_where_it_cannot_end(words: list[str], said: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--model", str(tiny_model("llava")), "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 1 and said in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists() and isinstance(result.exception, SystemExit)
