"""LFM2-VL in ONNX, of whose blocks some keep what a convolution saw last: pieces, turns, and pictures of any size.

Whole prompts and answers are compared in test_onnx_parity.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from feeding import chunkings
from onnx_runner import TOLERANCE, Runner, image_token, positions, session

from sasa_export.onnx import layout
from sasa_export.onnx.plain import vision_graph, write_model
from sasa_export.onnx.recipes import recipe_of

STEPS = 8
pytestmark = [pytest.mark.xdist_group("onnx-lfm2_vl"), pytest.mark.slow]


@pytest.fixture(scope="module")
def guarded(split: Any) -> Any:
    return split("lfm2_vl")


@pytest.fixture(scope="module")
def runner(guarded: Any, exported: Any) -> Runner:
    return Runner(exported(guarded.directory))


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@torch.no_grad()
def test_pieces(images: bool, guarded: Any, runner: Runner) -> None:
    """Rows padded on the left, whole, in pieces and token by token: one verdict, one answer."""
    inputs = guarded.batch(count=3, images=images, seed=4)
    expected, wanted = guarded.expected(inputs).numpy(), guarded.model(**inputs).logits[:, -1]  # (batch, ...)
    arrays, places = {name: value.numpy() for name, value in inputs.items()}, positions(guarded, inputs)[0].numpy()
    embeds, mask = runner.embed_prompt(arrays, image_token(guarded)), arrays["attention_mask"]
    for ends in chunkings(mask.shape[1], 1, 6):
        runner.pieces(embeds, mask, places, ends)
        assert runner.probability is not None
        np.testing.assert_allclose(runner.probability, expected, atol=TOLERANCE, err_msg=str(ends))
        np.testing.assert_allclose(runner.logits, wanted.numpy(), atol=TOLERANCE, err_msg=str(ends))


@torch.no_grad()
def test_second_turn(guarded: Any, runner: Runner) -> None:
    """A question on the kept cache is judged with all that came before it, and answered as in torch."""
    seen = set()
    for seed in range(20):
        inputs = guarded.batch(count=1, seed=seed)
        answer = torch.tensor([[70, 71, guarded.refusal[-1]]])  # (1, 3), the end of sequence last
        question = guarded.batch(count=1, images=False, seed=seed + 1)["input_ids"]  # (1, tokens)
        ids = torch.cat([inputs["input_ids"], answer, question], dim=1)  # (1, context)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runner.ask(guarded, inputs)
        length = inputs["input_ids"].shape[1]
        for place in range(answer.shape[1]):
            runner.step(answer[:, place].numpy(), np.array([[length + place]]))
        place = length + answer.shape[1]
        runner.call(runner.embed(question.numpy()), np.ones(ids.shape), np.arange(place, ids.shape[1])[None])
        expected = guarded.expected(whole).numpy()  # (1,)
        assert runner.probability is not None
        np.testing.assert_allclose(runner.probability, expected, atol=TOLERANCE)
        said = [int(runner.logits.argmax())]
        while len(said) < STEPS:
            runner.step(np.array(said[-1:]), np.array([[ids.shape[1] + len(said) - 1]]))
            said.append(int(runner.logits.argmax()))
        wanted = guarded.model.generate(**whole, max_new_tokens=STEPS, do_sample=False)[0, ids.shape[1] :].tolist()
        assert said[: len(wanted)] == wanted
        seen.add(bool(expected[0] >= guarded.model.config.sasa["threshold"]))
    assert seen == {True, False}, "both verdicts must have been seen"


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_pictures_of_any_size(normalised: bool, tmp_path: Path) -> None:
    """Grids smaller and larger than the learned square, four patches to a token, through onnxruntime."""
    text = hf.Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["full_attention"],
    )  # fmt: skip
    vision = hf.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4, num_patches=49,
        vision_use_head=False,
    )  # fmt: skip
    config = hf.Lfm2VlConfig(
        text_config=text, vision_config=vision, projector_hidden_size=24, image_token_id=3,
        projector_use_layernorm=normalised,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    model = hf.Lfm2VlForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)  # the same shape as the parameter
    write_model(vision_graph(model, recipe_of("lfm2_vl"), opset=23), tmp_path / "vision.onnx")
    graph = session(tmp_path / "vision.onnx")
    for grids in ([[2, 2]], [[4, 6], [2, 8], [20, 2], [14, 14]], [[2, 6], [24, 26]]):
        shapes = torch.tensor(grids)  # (images, 2)
        count = int(shapes.prod(-1).max()) + 3
        mask = (torch.arange(count) < shapes.prod(-1, keepdim=True)).long()  # (images, patches)
        pixels = torch.randn(len(grids), count, 48, generator=draw)  # (images, patches, pixels)
        fed = {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}
        wanted = torch.cat(model.get_image_features(**fed, return_dict=True).pooler_output)  # (tokens, hidden)
        (found,) = graph.run(None, {name: value.numpy() for name, value in fed.items()})
        np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE)


def test_a_checkpoint_that_counts_blocks_with_attention(guarded: Any) -> None:
    """Older ones name those in `full_attn_idxs`, of which runtimes know nothing."""
    config, text = guarded.stock.config.to_dict(), guarded.stock.config.text_config
    kinds = config["text_config"].pop("layer_types")
    config["text_config"]["full_attn_idxs"] = [place for place, kind in enumerate(kinds) if kind == "full_attention"]
    assert layout._config(config, text, {})["text_config"]["layer_types"] == kinds


@pytest.mark.parametrize(("resizing", "told"), [({"smart_resize": None}, {"do_resize": False}), ({}, {})])
def test_only_a_processor_that_fits_patches_keeps_transformers_js_from_resizing(resizing: Any, told: Any) -> None:
    """LFM2-VL's own one needs torchvision, so that a name stands for it here."""
    processor = SimpleNamespace(image_processor=SimpleNamespace(**resizing))
    assert layout._told_javascript(processor) == told
