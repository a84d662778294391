"""Tiny LLaVAs as libraries that quantize write them: one function a scheme, skipped where its library is missing."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, FineGrainedFP8Config

KEPT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # as the widest groups and blocks of a scheme want it


def build(scheme: str, directory: Path, **sizes: int) -> Path:
    """A tiny LLaVA, quantized by the scheme's own library, as its users save it."""
    plain = tiny.build("llava", directory / "plain", **(sizes or WIDE))
    out = directory / "quantized"
    SCHEMES[scheme](plain, out)
    finish(plain, out)
    return out


def finish(plain: Path, out: Path) -> None:
    """Give the directory a processor, which the libraries leave to their users."""
    AutoProcessor.from_pretrained(plain).save_pretrained(out)


def load(plain: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(plain, **options).eval()


def wanted(library: str, install: str = "'sasa-export[matrix]'") -> Any:
    return pytest.importorskip(library, reason=f"{library} is not installed: pip install {install}")


def bitsandbytes(plain: Path, out: Path, *, kept: list[str] = KEPT, **options: Any) -> None:
    wanted("bitsandbytes")
    config = BitsAndBytesConfig(llm_int8_skip_modules=kept, **options)
    load(plain, quantization_config=config, device_map="cpu").save_pretrained(out)


def torchao(plain: Path, out: Path, *, make: Callable[[Any], Any]) -> None:
    kinds = wanted("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(make(kinds), modules_to_not_convert=KEPT)
    load(plain, quantization_config=config, device_map="cpu", dtype=torch.bfloat16).save_pretrained(out)


def compressed_tensors(plain: Path, out: Path, *, preset: str) -> None:
    library = wanted("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.format import infer_model_format

    # The weights of 4-bit floats come out in bfloat16, whatever the model is in.
    model = load(plain, dtype=torch.bfloat16 if "FP4" in preset else torch.float32)
    groups = {"group_0": library.preset_name_to_scheme(preset, ["Linear"])}
    config = library.QuantizationConfig(config_groups=groups, ignore=["lm_head", *(f"re:{name}.*" for name in KEPT)])
    library.apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            observe(module)
    config.format = infer_model_format(model)
    compressor = ModelCompressor(config)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))


def observe(module: Any) -> None:
    """Give a module the scales of its own weights, which a calibration would give it."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights, weight = module.quantization_scheme.weights, module.weight.detach()  # (outputs, inputs)
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data = whole
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data = torch.tensor([100.0])
    parts: Tensor = weight
    if weights.group_size:
        parts = weight.unflatten(-1, (-1, weights.group_size))
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), weights, whole)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)


def gptqmodel(plain: Path, out: Path, *, method: str, layout: str) -> None:
    """GPTQ and AWQ differ in how they choose numbers, and in how they lay them out; here they are rounded alike."""
    wanted("gptqmodel", "gptqmodel optimum")
    from gptqmodel.quantization import METHOD, QuantizeConfig
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    group = 32
    same: dict[str, Any] = {"bits": 4, "group_size": group, "desc_act": False, "sym": True}
    packed = hf_select_quant_linear_v2(
        **same, format=layout, backend="auto", device_map={"": "cpu"}, quant_method=METHOD(method), zero_point=True,
        pack=True,
    )  # fmt: skip
    model = load(plain, dtype=torch.float16)
    for name, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and ".language_model.layers." in name:
            scales = linear.weight.unflatten(1, (-1, group)).abs().amax(-1) / 7  # (outputs, groups)
            sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
            layer = packed(**same, **sizes, register_buffers=True)
            layer.pack(linear, scales, torch.full_like(scales, 8), torch.arange(linear.in_features) // group)
            if method == "gptq":  # in files, zero points are stored less one
                convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(**same))
            model.set_submodule(name, layer)
    model.save_pretrained(out)
    more = {"zero_point": True, "version": layout, "modules_to_not_convert": KEPT} if method == "awq" else {}
    write_scheme(out, {"quant_method": method, **same, **more})


def fine_grained_fp8(plain: Path, out: Path) -> None:
    """Written by hand, as transformers writes it on a GPU alone."""
    from safetensors.torch import save_file

    block = (32, 32)
    model = load(plain)
    state = {}
    for name, tensor in model.state_dict().items():
        if "layers" in name and "proj.weight" in name and "vision" not in name:
            tiles = tensor.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # (rows, 32, columns, 32)
            scale = tiles.abs().amax((1, 3)) / 448.0
            state[name] = (tiles / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale
        else:
            state[name] = tensor
    config = FineGrainedFP8Config(weight_block_size=block, modules_to_not_convert=KEPT)
    model.save_pretrained(out)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, out / "model.safetensors", {"format": "pt"}
    )
    write_scheme(out, config.to_dict())


def write_scheme(directory: Path, scheme: dict[str, Any]) -> None:
    """Let config.json say how the weights are quantized."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": scheme}))


SCHEMES: dict[str, Callable[[Path, Path], None]] = {
    "bitsandbytes 8 bits": partial(bitsandbytes, load_in_8bit=True),
    "bitsandbytes nf4": partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes fp4, nested": partial(
        bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    **{
        f"compressed-tensors {preset}": partial(compressed_tensors, preset=preset)
        for preset in ("W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4")
    },
    "torchao int8 weights": partial(torchao, make=lambda kinds: kinds.Int8WeightOnlyConfig()),
    "torchao int4 weights": partial(
        torchao,
        make=lambda kinds: kinds.IntxWeightOnlyConfig(torch.int4, granularity=kinds.PerGroup(32)),  # type: ignore[attr-defined]
    ),
    "torchao float8 weights": partial(torchao, make=lambda kinds: kinds.Float8WeightOnlyConfig()),
    "GPTQ": partial(gptqmodel, method="gptq", layout="gptq"),
    "AWQ": partial(gptqmodel, method="awq", layout="gemm"),
    "fine-grained FP8": fine_grained_fp8,
}
