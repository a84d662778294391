"""Tiny random models of the families beyond those of `tiny.FAMILIES`: narrower, of five blocks.

Where a family's own processor insists on torchvision, a stock one stands in that puts as many image tokens into the
prompt and gives the model the same inputs: what is tried here is the model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import tiny
import transformers as hf
from tiny import IMAGE_SIZE, PATCH
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

BLOCKS = 5
SAFETY, SEMANTIC = 2, 3
RECURRENT = ("qwen3_5", "qwen3_5_moe", "lfm2_vl")

Made = tuple[PreTrainedConfig, ProcessorMixin]

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_VISION: dict[str, Any] = tiny.VISION | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def _text(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any], **own: Any) -> dict[str, Any]:
    return tiny.text_fields(tokenizer, _SIZES | own | overrides)


def _llama_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    special = "<unk> <s> </s> <image> <pad>"
    return tiny.make_tokenizer(special, bos="<s>", eos="</s>", pad="<pad>", template=tiny.LLAVA_TEMPLATE, **named)


def _square(
    overrides: dict[str, Any],
    *,
    name: str,
    text: type,
    vision: PreTrainedConfig,
    cell: int,
    dropped: bool = False,
    own: dict[str, Any] | None = None,
    **fields: Any,
) -> Made:
    """A square picture, one token for each `cell` pixels a side: LLaVA's processor, with or without CLS `dropped`.

    Args: own: fields of the text config; `fields`: of the whole one.
    """
    tokenizer = _llama_tokenizer()
    config = getattr(hf, f"{name}Config")(
        text_config=text(**_text(tokenizer, overrides, **(own or {}))),
        vision_config=vision,
        image_token_id=tokenizer.get_vocab()["<image>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
        **fields,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return config, hf.LlavaProcessor(
        images, tokenizer, patch_size=cell, num_additional_image_tokens=int(dropped),
        vision_feature_select_strategy="default" if dropped else "full", chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


class Patches(hf.LlavaProcessor):
    """One token for each patch of SigLIP 2, which no stock processor without torchvision gives."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * int(image_inputs["spatial_shapes"][image_idx].prod())


class SoftTokens(hf.LlavaProcessor):
    """As many tokens as Gemma 4 makes of a picture's patches, and which of the tokens they are."""

    return_mm_token_type_ids = True

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * int(image_inputs["num_soft_tokens_per_image"][image_idx])

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_soft_tokens_per_image"]


hf.AutoProcessor.register(hf.Lfm2VlConfig, Patches, exist_ok=True)
hf.AutoProcessor.register(hf.Gemma4Config, SoftTokens, exist_ok=True)


def _grid(overrides: dict[str, Any], *, name: str, vision: dict[str, Any], text: dict[str, Any]) -> Made:
    """Qwen's way with pictures: patches of any number in a row, and each picture's grid."""
    special = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
    tokenizer = tiny.make_tokenizer(
        special, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=tiny.QWEN_TEMPLATE,
        image_token="<|image_pad|>", video_token="<|video_pad|>",
    )  # fmt: skip
    ids = tokenizer.get_vocab()
    # Sections add up to half of the head dimension, 8.
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 1, 1]}
    fields = _text(tokenizer, overrides, rope_parameters=rope, **text)
    starts = "image" if name.startswith("Glm") else "vision"
    config = getattr(hf, f"{name}Config")(
        text_config=fields,
        vision_config={"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2,
                       "depth": 2, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        **{f"{starts}_start_token_id": ids["<|vision_start|>"], f"{starts}_end_token_id": ids["<|vision_end|>"]},
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )  # fmt: skip
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = hf.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    return config, hf.PaddleOCRVLProcessor(images, tokenizer, chat_template=tiny.QWEN_TEMPLATE)


_MERGED: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}


def _llava_onevision(overrides: dict[str, Any]) -> Made:
    """LLaVA-OneVision: Qwen2 text, SigLIP vision, tiles; the processor of LLaVA-NeXT counts alike without CLS."""
    tokenizer = _llama_tokenizer()
    wide, square = 2 * IMAGE_SIZE, IMAGE_SIZE
    pinpoints = [[square, wide], [wide, square], [wide, wide]]
    vision = _VISION | {"patch_size": 2 * PATCH, "vision_use_head": False}
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**_text(tokenizer, overrides)),
        vision_config=hf.SiglipVisionConfig(**vision),
        image_token_index=tokenizer.get_vocab()["<image>"],
        video_token_index=tokenizer.get_vocab()["<unk>"],
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints)
    return config, hf.LlavaNextProcessor(
        images, tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


def _granite_vision(overrides: dict[str, Any]) -> Made:
    """Granite Vision 3: a llava_next of Granite text, and features of several layers of SigLIP vision, without CLS."""
    tokenizer = _llama_tokenizer()
    wide, square = 2 * IMAGE_SIZE, IMAGE_SIZE
    tiles = {"image_grid_pinpoints": [[square, wide], [wide, square], [wide, wide]]}
    granite = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
    config = hf.LlavaNextConfig(
        text_config=hf.GraniteConfig(**_text(tokenizer, overrides, **granite)),
        vision_config=hf.SiglipVisionConfig(**_VISION | {"patch_size": 2 * PATCH}, vision_use_head=False),
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        **tiles,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size, **tiles)
    return config, hf.LlavaNextProcessor(
        images, tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


def _aya_vision(overrides: dict[str, Any]) -> Made:
    """Aya Vision: Cohere2 text with sliding and full layers, SigLIP vision, tiles."""
    tiles = "<|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE TILE_GLOBAL"
    tokenizer = tiny.make_tokenizer(
        f"<unk> <s> </s> <image> <pad> {tiles}", bos="<s>", eos="</s>", pad="<pad>", template=tiny.LLAVA_TEMPLATE
    )
    config = hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(**_text(tokenizer, overrides, sliding_window=8, logit_scale=0.25)),
        vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
        image_token_index=tokenizer.get_vocab()["<|IMG_PATCH|>"],
        downsample_factor=2,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    return config, hf.AyaVisionProcessor(
        images, tokenizer, patch_size=PATCH, img_size=IMAGE_SIZE, downsample_factor=2,
        chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


def _idefics2(overrides: dict[str, Any]) -> Made:
    """Idefics2: Mistral text, SigLIP-like vision of any ratio, a perceiver that gives each picture a few tokens."""
    tokenizer = tiny.make_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|> <end_of_utterance> <fake_token_around_image> <image>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        template=tiny.IDEFICS_TEMPLATE,
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )
    text = hf.MistralConfig(**_text(tokenizer, overrides, sliding_window=None))
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    config = hf.Idefics2Config(
        text_config=text,
        vision_config=_VISION,
        perceiver_config=perceiver,
        image_token_id=tokenizer.get_vocab()["<image>"],
    )
    images = hf.Idefics2ImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE // 2, "longest_edge": IMAGE_SIZE}, do_image_splitting=False
    )
    return config, hf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=tiny.IDEFICS_TEMPLATE)


def _mistral3(overrides: dict[str, Any], *, merged: int = 2) -> Made:
    """Mistral 3: Mistral text, Pixtral vision of any size, patches `merged`; they are not in Pixtral-12B, a llava."""
    tokenizer = tiny.make_tokenizer(
        "<unk> <s> </s> [IMG] [IMG_BREAK] [IMG_END] <pad>", bos="<s>", eos="</s>", pad="<pad>",
        template=tiny.LLAVA_TEMPLATE.replace("<image>", "[IMG]"), image_token="[IMG]", image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )  # fmt: skip
    own: dict[str, Any] = {"spatial_merge_size": merged} if merged > 1 else {"vision_feature_select_strategy": "full"}
    patch = PATCH if merged > 1 else 2 * PATCH
    config = (hf.Mistral3Config if merged > 1 else hf.LlavaConfig)(
        text_config=hf.MistralConfig(**_text(tokenizer, overrides, sliding_window=None, head_dim=8)),
        vision_config=hf.PixtralVisionConfig(**_VISION | {"image_size": 64, "patch_size": patch}),
        image_token_index=tokenizer.get_vocab()["[IMG]"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **own,
    )
    images = hf.PixtralImageProcessorPil(patch_size=2 * PATCH, size={"longest_edge": 64})
    return config, hf.LightOnOcrProcessor(
        images, tokenizer, patch_size=patch, spatial_merge_size=merged, chat_template=tokenizer.chat_template
    )


_GLM = partial(_grid, vision=_MERGED | {"image_size": 64}, text={})


def _llama4(overrides: dict[str, Any]) -> Made:
    """Llama 4: chunked blocks with rotary positions and full blocks without, experts in every second block."""
    vision = hf.Llama4VisionConfig(
        **_VISION | {"intermediate_size": 64}, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
        pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    own = {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16, "no_rope_layer_interval": 3,
    }  # fmt: skip
    return _square(overrides, name="Llama4", text=hf.Llama4TextConfig, vision=vision, cell=2 * PATCH, own=own)


def _lfm2_vl(overrides: dict[str, Any]) -> Made:
    """LFM2-VL: blocks with a short convolution and blocks with attention; SigLIP 2 with patches of any number."""
    tokenizer = _llama_tokenizer()
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    text = hf.Lfm2Config(**_text(tokenizer, overrides, layer_types=kinds, block_multiple_of=8))
    config = hf.Lfm2VlConfig(
        text_config=text,
        vision_config=hf.Siglip2VisionConfig(**_VISION, num_patches=16, vision_use_head=False),
        image_token_id=tokenizer.get_vocab()["<image>"],
        projector_hidden_size=24,
        downsample_factor=1,
        tie_word_embeddings=False,
    )
    images = hf.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16)
    return config, Patches(images, tokenizer, chat_template=tiny.LLAVA_TEMPLATE)


def _gemma4(overrides: dict[str, Any]) -> Made:
    """Gemma 4: sliding and full blocks with heads of different sizes, patches of any number."""
    tokenizer = _llama_tokenizer()
    ids = tokenizer.get_vocab()
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    own: dict[str, Any] = {
        "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "sliding_window": 8, "layer_types": kinds, "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3,
        "position_embedding_size": 64,
    }  # fmt: skip
    config = hf.Gemma4Config(
        text_config=_text(tokenizer, own | overrides), vision_config=vision, audio_config=None,
        image_token_id=ids["<image>"],
        **dict.fromkeys(("video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id"), ids["<unk>"]),
    )  # fmt: skip
    images = hf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    return config, SoftTokens(images, tokenizer, chat_template=tiny.LLAVA_TEMPLATE)


_QWEN3_5: dict[str, Any] = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_STACKED = _MERGED | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}

MAKERS: dict[str, Callable[[dict[str, Any]], Made]] = {
    "qwen2_vl": partial(_grid, name="Qwen2VL", vision={"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, text={}),
    "internvl": partial(
        _square, name="InternVL", text=hf.Qwen2Config, cell=2 * PATCH,
        vision=hf.InternVLVisionConfig(**_VISION | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH] * 2}),
    ),
    "llava_onevision": _llava_onevision,
    "glm4v": partial(_GLM, name="Glm4v"),
    "glm46v": partial(_GLM, name="Glm46V"),
    "aya_vision": _aya_vision,
    "idefics2": _idefics2,
    "mistral3": _mistral3,
    "pixtral": partial(_mistral3, merged=1),
    "granite_vision": _granite_vision,
    "vipllava": partial(
        _square, name="VipLlava", text=hf.LlamaConfig, cell=PATCH, dropped=True,
        vision=hf.CLIPVisionConfig(**_VISION, projection_dim=16), vision_feature_layer=[-1, -2], image_seq_length=16,
    ),
    "qwen3_vl": partial(_grid, name="Qwen3VL", vision=_STACKED, text={"head_dim": 8}),
    "qwen3_vl_moe": partial(_grid, name="Qwen3VLMoe", vision=_STACKED, text={"head_dim": 8, **_EXPERTS}),
    "qwen3_5": partial(_grid, name="Qwen3_5", vision=_MERGED | {"num_position_embeddings": 64}, text=_QWEN3_5),
    "qwen3_5_moe": partial(
        _grid, name="Qwen3_5Moe", vision=_MERGED | {"num_position_embeddings": 64},
        text=_QWEN3_5 | _EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "lfm2_vl": _lfm2_vl,
    "gemma4": _gemma4,
    "llama4": _llama4,
    "cohere2_vision": partial(
        _square, name="Cohere2Vision", text=hf.Cohere2Config, cell=2 * PATCH, own={"sliding_window": 8},
        vision=hf.SiglipVisionConfig(**_VISION, vision_use_head=False), alignment_intermediate_size=24,
    ),
}  # fmt: skip
