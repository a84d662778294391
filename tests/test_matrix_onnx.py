"""The bypass matrix for onnxruntime: every way of running the graphs, beside the stock model in torch."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import onnx_every_token, onnx_rows, onnx_sessions  # noqa: F401
from matrix.onnx_bench import Graphs, OnnxBench
from matrix.outcome import Row, recorded, rows
from onnx_runner import Runner, image_token
from transformers import AutoModelForImageTextToText

CASES = [
    pytest.param(one, family, id=f"{one.identifier}-{family}", marks=pytest.mark.xdist_group(f"onnx-{family}"))
    for one, family in rows("onnxruntime")
]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`plain(patched, dtype)`: the decoder without the gate as the same code writes it, once per session."""
    from sasa_export.writers.onnx.graphs import decoder_graph, write_model
    from sasa_export.writers.onnx.layout import stock_type
    from sasa_export.writers.onnx.passes.weights import deduplicate
    from sasa_export.writers.onnx.quantize import BITS, quantize
    from sasa_export.writers.onnx.recipes import recipe_of

    @cache
    def graph(patched: Path, dtype: str) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(
            patched, dtype=getattr(torch, dtype), trust_remote_code=True, attn_implementation="sdpa"
        ).eval()
        recipe = recipe_of(stock_type(model.config.model_type))
        return decoder_graph(model, recipe, opset=23, dtype=dtype, guarded=False)

    @cache
    def get(patched: Path, dtype: str) -> Path:
        found = graph(patched, "float32" if dtype in BITS else dtype)
        if dtype in BITS:  # converted once for all of them
            found = found.clone()
            quantize(found, dtype)
            deduplicate(found)
        path = tmp_path_factory.mktemp("plain") / "decoder_model_merged.onnx"
        write_model(found, path)
        return path

    return get


@pytest.mark.parametrize(("one", "family"), CASES)
@torch.no_grad()
def test_way(
    split: Callable[[str], Any],
    guard: Callable[..., Any],
    exported: Callable[..., Path],
    plain: Callable[..., Path],
    one: Row,
    family: str,
) -> None:
    """Harmful refused and harmless unchanged, or all refused where a graph cannot raise an error."""
    with recorded(one, family) as found:
        every_token = one.section == onnx_every_token.SECTION
        guarded = guard(family, gate="every-token") if every_token else split(family)
        bench = onnx_every_token.Retuned if every_token else OnnxBench

        def directories(opset: int = 23, dtype: str = "float32") -> Path:
            return exported(guarded.directory, opset=opset, dtype=dtype)

        graphs = Graphs(Runner(directories()), image_token(guarded))
        source = split(family).directory  # without its gate the decoder is the same
        found.append(one.run(bench(guarded, graphs, directories, lambda dtype: plain(source, dtype))))
