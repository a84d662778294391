"""`--probe-positions`: the probe reads the mean over the prompt's last tokens, and all else stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import Guard
from onnx_runner import Runner, image_token, positions
from safetensors.torch import save_file
from test_feeding import chunkings, feed, last_picture_token
from transformers import AutoModelForImageTextToText

import sasa_export
from sasa_export.cli import main
from sasa_export.runtime.settings import check_settings
from sasa_export.runtime.words import last_places

Guards = Callable[..., Guard]

FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llava", "gemma3", "qwen2_5_vl")]
every_family = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 1e-5


def batch(
    guarded: Guard, *, images: bool = True, count: int = 4, side: Literal["left", "right"] = "left"
) -> dict[str, Any]:
    return dict(tiny.prompts(guarded.processor, images=images, count=count, seed=4, padding_side=side))


def test_the_last_places_skip_padding() -> None:
    real = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    assert last_places(real, torch.tensor([[5, 2], [3, 0]]), 3).tolist() == [
        [[5, 4, 2], [2, 1, -1]],
        [[3, 2, 1], [0, -1, -1]],
    ]
    nothing = torch.zeros(1, 2).bool()
    assert last_places(nothing, torch.tensor([[0]]), 2).tolist() == [[[-1, -1]]]


@every_family
@pytest.mark.parametrize("count", [3, 64], ids=["three", "more than there are"])
@torch.no_grad()
def test_the_verdict_is_the_oracles(guard: Guards, family: str, count: int) -> None:
    """However the prompt is fed; refused rows spell the refusal, and allowed ones are the stock model's."""
    guarded = guard(family, probe_positions=count)
    inputs = batch(guarded, images=count == 3)  # a prompt with a picture has more tokens than are ever read
    assert count == 3 or inputs["input_ids"].shape[1] < count
    expected = guarded.expected(inputs)  # (batch,)
    assert (expected - guard(family).expected(inputs)).abs().max() > 1e-3, "the oracle must see what the probe reads"
    with guarded.halved(inputs) as refused:
        for ends in chunkings(inputs["input_ids"].shape[1], last_picture_token(guarded, inputs), seed=1)[:5]:
            found = feed(guarded, inputs, ends).unsafe_probability  # (batch,)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE)
        said, plain = (
            model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
            for model in (guarded.model, guarded.stock)
        )  # (batch, tokens)
    assert refused.any() and not refused.all()
    assert all(row.tolist() == guarded.refusal[: len(row)] for row in said[refused])
    width = min(said.shape[1], plain.shape[1])
    assert torch.equal(said[~refused, :width], plain[~refused, :width])


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_padding_on_the_right(guard: Guards) -> None:
    guarded = guard("llava", probe_positions=3)
    inputs = batch(guarded, side="right")
    found = guarded.model(**inputs).unsafe_probability  # (batch,)
    torch.testing.assert_close(found, guarded.expected(inputs), rtol=0.0, atol=TOLERANCE)


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_with_a_lane_that_ends_early(guard: Guards) -> None:
    guarded = guard("llava", probe_positions=3, probe_block=3)
    inputs = batch(guarded)
    expected = guarded.expected(inputs)  # (batch,)
    assert (expected - guard("llava", probe_positions=3).expected(inputs)).abs().max() > 1e-3
    torch.testing.assert_close(guarded.model(**inputs).unsafe_probability, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_a_conversation_in_one_call(guard: Guards) -> None:
    """The logits of an earlier answer are refused where its own prompt's mean is unsafe, and only there."""
    guarded = guard("llava", probe_positions=3)
    first, second = (batch(guarded, images=False, count=2)["input_ids"][row] for row in (0, 1))
    first, second = (ids[ids != guarded.processor.tokenizer.pad_token_id][None] for ids in (first, second))
    end = torch.tensor([[guarded.refusal[-1]]])
    whole = torch.cat([first, torch.tensor([[5, 6]]), end, second], dim=1)  # (1, tokens)
    early, late = (
        float(guarded.expected({"input_ids": ids, "attention_mask": torch.ones_like(ids)})) for ids in (first, whole)
    )
    assert abs(early - late) > 1e-3
    place = first.shape[1] - 1
    plain = guarded.stock(input_ids=whole).logits  # (1, tokens, vocabulary)
    with guarded.at((early + late) / 2):
        found = guarded.model(input_ids=whole)
    torch.testing.assert_close(float(found.unsafe_probability), late, rtol=0.0, atol=TOLERANCE)
    changed = (found.logits != plain).any(-1)[0]  # (tokens,)
    assert bool(changed[place]) == (early > late) and bool(changed[-1]) == (late > early)


@pytest.mark.xdist_group("llava")
@torch.no_grad()
def test_without_projection(guard: Guards, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The mean over the main lane's last tokens, as the stock model's logits say."""
    other = guard("llava")
    probe = {"sasa.probe.weight": oracle.folded(other.stock, other.weight), "sasa.probe.bias": torch.tensor(other.bias)}
    save_file(probe, tmp_path / "probe.safetensors")
    sasa_export.patch(
        sasa_export.Options(
            model=str(tiny_model("llava")), out=tmp_path / "out", probe=tmp_path / "probe.safetensors",
            projection="none", probe_positions=4, verify="files",
        )
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    inputs = batch(other)
    logits = oracle.mean_of_last(other.stock(**inputs).logits, inputs, 4)  # (batch, vocabulary)
    expected = oracle.unsafe_probability(logits, other.weight, other.bias)  # (batch,)
    torch.testing.assert_close(model(**inputs).unsafe_probability, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.xdist_group("onnx-llava")
@torch.no_grad()
def test_in_onnx(guard: Guards, exported: Callable[..., Path]) -> None:
    guarded = guard("llava", probe_positions=3)
    runner, inputs = Runner(exported(guarded.directory)), batch(guarded)
    ids, _ = positions(guarded, inputs)
    runner.prompt({name: value.numpy() for name, value in inputs.items()}, image_token(guarded), ids.numpy())
    assert runner.probability is not None
    np.testing.assert_allclose(runner.probability, guarded.expected(inputs).numpy(), atol=1e-4, rtol=0)


def test_settings_and_card(guard: Guards) -> None:
    guarded = guard("llava", probe_positions=3)
    card = (guarded.directory / "README.md").read_text()
    assert "a linear probe on the mean over the prompt's last 3 tokens decides" in card
    assert "final norm, mean over the last 3 positions" in card
    sasa = dict(guarded.model.config.sasa)
    assert check_settings(sasa)
    for wrong in ({"probe_positions": 1}, {"probe_positions": 4}, {"probe_positions": "3"}, {"gate": "every-token"}):
        with pytest.raises(ValueError, match=r"config\.sasa"):
            check_settings({**sasa, **wrong})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--probe-positions", "0"], "it must be from 1 to 64"),
        (["--probe-positions", "65"], "it must be from 1 to 64"),
        (["--probe-positions", "2", "--gate", "every-token"], "there each token is judged by itself"),
    ],
)
def test_what_it_does_not_go_with(words: list[str], said: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--model", str(tiny_model("llava")), "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 1 and said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists() and isinstance(result.exception, SystemExit)
