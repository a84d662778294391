"""Graphs whose weights somebody rounded notice it: they refuse every prompt, whole and in pieces."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_runner import Runner
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

pytestmark = pytest.mark.xdist_group("onnx-llava")


def in_blocks(path: Path, bits: int) -> None:
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, path)


WAYS = {
    "4 bits": lambda path: in_blocks(path, 4),
    "8 bits": lambda path: in_blocks(path, 8),
    "dynamic int8": lambda path: quantize_dynamic(path, path, ["MatMul"], weight_type=QuantType.QInt8),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_prompt_is_refused(way: str, split: Any, exported: Any, tmp_path: Path) -> None:
    """The lane does not run over the token that is known."""
    guard = split("llava")
    directory = shutil.copytree(exported(guard.directory), tmp_path / "copy")
    WAYS[way](directory / "onnx" / "decoder_model_merged.onnx")
    inputs, runner = guard.batch(count=6), Runner(directory)
    ids, _ = runner.ask(guard, inputs)  # (batch, tokens)
    check(runner, guard)
    tokens, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()  # (batch, tokens)
    count = tokens.shape[1]
    runner.pieces(runner.embed(tokens), mask, ids.numpy(), [count // 2, count])
    check(runner, guard)


def check(runner: Runner, guard: Any) -> None:
    assert runner.probability is not None and np.isnan(runner.probability).all()
    assert (runner.logits.argmax(-1) == guard.refusal[0]).all()
