"""Tiny random models of the families beyond those of `tiny.FAMILIES`: narrower, of five blocks.

Where a family's own processor insists on torchvision, a stock one stands in that puts as many image tokens into the
prompt and gives the model the same inputs: what is tried here is the model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tiny
import torch
import transformers as hf
from tiny import IMAGE_SIZE, PATCH
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

BLOCKS = 5
SAFETY, SEMANTIC = 2, 3
RECURRENT = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "minicpmv4_6", "minicpmv4_7", "lfm3_vl")
# Of a version of transformers in which the stock model fails at each call.
BROKEN = {("llama4", "5.24.0"): "its forward reads image_outputs, which its text model's output has not"}
GIVEN_CACHE = ("granite4_vision",)  # whose decoder makes no cache where it is given none

Made = tuple[PreTrainedConfig, ProcessorMixin]

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_VISION: dict[str, Any] = tiny.VISION | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


_TILES = {"image_grid_pinpoints": [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE] * 2]}


def _text(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any], **own: Any) -> dict[str, Any]:
    return tiny.text_fields(tokenizer, _SIZES | own | overrides)


def _tile_images() -> hf.LlavaNextImageProcessorPil:
    """LLaVA-NeXT's way with pictures: each whole, and cut into tiles."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return hf.LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size, **_TILES)


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


class Slices(hf.LlavaProcessor):
    """One token for each 16 patches of a picture and of its slices, between the marks of MiniCPM-V."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        counts = image_inputs["num_patches_per_image"]
        first = sum(counts[:image_idx])
        sizes = image_inputs["target_sizes"][first : first + counts[image_idx]]  # (slices, 2)
        whole, *slices = [self.image_token * (int(patches) // 16) for patches in sizes.prod(-1)]
        rows, columns = image_inputs["grids"][image_idx]
        lines = [slices[row * columns : (row + 1) * columns] for row in range(rows)]
        return f"<im>{whole}</im>" + "\n".join("".join(f"<slice>{part}</slice>" for part in line) for line in lines)

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_patches_per_image", "grids"]


class TypedSlices(Slices):
    """MiniCPM-V 4.7 finds its positions by the types of tokens."""

    return_mm_token_type_ids = True


class OneTile(hf.LlavaProcessor):
    """Each picture as the only one of its tiles: pixel_values of shape (pictures, 1, channels, height, width)."""

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        found, replacements = super()._process_images(images, **kwargs)
        found["pixel_values"] = torch.as_tensor(np.stack(found["pixel_values"]))[:, None]
        return found, replacements


class Untyped(hf.PaddleOCRVLProcessor):
    """As Qwen's, without the types of tokens, which models with one axis of positions do not take."""

    return_mm_token_type_ids = False


class Squares(Untyped):
    """Patches as small pictures, as Kimi takes them: pixel_values of shape (patches, channels, height, width)."""

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        found, replacements = super()._process_images(images, **kwargs)
        found["pixel_values"] = torch.as_tensor(found["pixel_values"]).reshape(-1, 3, PATCH, PATCH)
        return found, replacements


class Pooled(hf.LlavaProcessor):
    """Molmo's way with pictures: patches of each, and of which four of them a token is made."""

    return_mm_token_type_ids = True

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        found, replacements = super()._process_images(images, **kwargs)
        pictures = torch.as_tensor(np.stack(found["pixel_values"]))  # (pictures, 3, height, width)
        side, count = pictures.shape[-1] // PATCH, len(pictures)
        patches = torch.nn.functional.unfold(pictures, PATCH, stride=PATCH).mT  # (pictures, side * side, pixels)
        numbers = torch.arange(count * side * side).reshape(count, side // 2, 2, side // 2, 2)
        found = {
            "pixel_values": patches,
            "image_token_pooling": numbers.transpose(2, 3).reshape(-1, 4),
            "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]] * count),
        }
        return found, replacements


class Routed(hf.PaddleOCRVLProcessor):
    """As Qwen's, and by which experts ERNIE runs a token: those of pictures for the marks around a picture too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        marks = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
        found["moe_mm_token_type_ids"] = torch.isin(torch.as_tensor(found["input_ids"]), torch.tensor(marks)).long()
        return found


hf.AutoProcessor.register(hf.Kimi_K25Config, Squares, exist_ok=True)
hf.AutoProcessor.register(hf.Molmo2Config, Pooled, exist_ok=True)
hf.AutoProcessor.register(hf.Lfm2VlConfig, Patches, exist_ok=True)
hf.AutoProcessor.register(hf.Gemma4Config, SoftTokens, exist_ok=True)
hf.AutoProcessor.register(hf.MiniCPMV4_6Config, Slices, exist_ok=True)
hf.AutoProcessor.register(hf.MiniCPMV4_7Config, TypedSlices, exist_ok=True)
hf.AutoProcessor.register(hf.Gemma4UnifiedConfig, SoftTokens, exist_ok=True)
hf.AutoProcessor.register(hf.Ernie4_5_VLMoeConfig, Routed, exist_ok=True)
hf.AutoProcessor.register(hf.Lfm3VlConfig, Untyped, exist_ok=True)
hf.AutoProcessor.register(hf.PerceptionLMConfig, OneTile, exist_ok=True)
hf.AutoProcessor.register(hf.Exaone4_5_Config, Untyped, exist_ok=True)


def _grid(
    overrides: dict[str, Any],
    *,
    name: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    processor: type = hf.PaddleOCRVLProcessor,
    **more: Any,
) -> Made:
    """Qwen's way with pictures: patches of any number in a row, and each picture's grid."""
    special = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
    tokenizer = tiny.make_tokenizer(
        special, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=tiny.QWEN_TEMPLATE,
        image_token="<|image_pad|>", video_token="<|video_pad|>",
    )  # fmt: skip
    ids = tokenizer.get_vocab()
    # Sections add up to half of the head dimension, 8.
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 1, 1]}
    fields = _text(tokenizer, overrides, **{"rope_parameters": rope, **text})
    starts = "image" if name.startswith(("Glm", "Ernie")) else "vision"
    config = getattr(hf, f"{name}Config")(
        text_config=fields,
        vision_config={"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2,
                       "depth": 2, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        **{f"{starts}_start_token_id": ids["<|vision_start|>"], f"{starts}_end_token_id": ids["<|vision_end|>"]},
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
        **more,
    )  # fmt: skip
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    frames = vision.get("temporal_patch_size", 2)
    images = hf.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=frames, size=size)
    return config, processor(images, tokenizer, chat_template=tiny.QWEN_TEMPLATE)


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
    granite = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
    config = hf.LlavaNextConfig(
        text_config=hf.GraniteConfig(**_text(tokenizer, overrides, **granite)),
        vision_config=hf.SiglipVisionConfig(**_VISION | {"patch_size": 2 * PATCH}, vision_use_head=False),
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        **_TILES,
    )
    return config, hf.LlavaNextProcessor(
        _tile_images(), tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
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


def _gemma4_unified(overrides: dict[str, Any]) -> Made:
    """Gemma 4 without a tower: each patch goes through one layer, and is a token."""
    config, processor = _gemma4(overrides)
    own = config.text_config.to_dict() | {"model_type": "gemma4_unified_text"}
    unified = hf.Gemma4UnifiedConfig(
        text_config=own,
        vision_config={"patch_size": 4, "pooling_kernel_size": 3, "mm_embed_dim": 16, "output_proj_dims": 16,
                       "mm_posemb_size": 80},
        audio_config=None,
        **{name: getattr(config, name) for name in ("image_token_id", "video_token_id", "audio_token_id",
                                                    "boi_token_id", "eoi_token_id")},
    )  # fmt: skip
    images = hf.Gemma4ImageProcessorPil(patch_size=12, pooling_kernel_size=1, max_soft_tokens=70)
    return unified, SoftTokens(images, processor.tokenizer, chat_template=tiny.LLAVA_TEMPLATE)


def _minicpmv(overrides: dict[str, Any], *, name: str, processor: type) -> Made:
    """MiniCPM-V: Qwen3.5 text, a picture and its slices as patches in a row, merged within the tower and behind."""
    tokenizer = tiny.make_tokenizer(
        "<unk> <s> </s> <image> <pad> <im> </im> <slice> </slice>", bos="<s>", eos="</s>", pad="<pad>",
        template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip
    ids = tokenizer.get_vocab()
    marks = {"image_start": "<im>", "image_end": "</im>", "slice_start": "<slice>", "slice_end": "</slice>"}
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 1, 1]}
    config = getattr(hf, f"{name}Config")(
        text_config=hf.Qwen3_5TextConfig(**_text(tokenizer, overrides, rope_parameters=rope, **_QWEN3_5)),
        vision_config=_VISION | {"image_size": 64, "patch_size": 4},
        insert_layer_id=0,
        image_token_id=ids["<image>"],
        video_token_id=ids["<unk>"],
        **{f"{mark}_id": ids[token] for mark, token in marks.items()},
        newline_id=tokenizer.encode("\n", add_special_tokens=False)[0],
    )
    # More than one token a slice: a product with one row rounds by where in memory the weights are.
    images = hf.MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=IMAGE_SIZE, max_slice_nums=3)
    return config, processor(images, tokenizer, chat_template=tiny.LLAVA_TEMPLATE)


def _granite4_vision(overrides: dict[str, Any]) -> Made:
    """Granite Vision 4: features of SigLIP's layers are added in front of the first blocks, and none to the tokens."""
    tokenizer = _llama_tokenizer()
    granite = {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    }  # fmt: skip
    config = hf.Granite4VisionConfig(
        text_config=hf.Granite4VisionTextConfig(**_text(tokenizer, overrides, **granite)),
        # The width of a head of the window Q-Former is 64, whatever the tower's is.
        vision_config=hf.SiglipVisionConfig(**_VISION | {"hidden_size": 64}, vision_use_head=False),
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 24,
                        "cross_attention_frequency": 1, "use_qformer_text_input": False},
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2],
        **_TILES,
    )  # fmt: skip
    return config, hf.Granite4VisionProcessor(
        _tile_images(), tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", downsample_rate="1/2",
        chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


def _perception_lm(overrides: dict[str, Any]) -> Made:
    """Perception LM: Llama text, and CLIP in place of timm's tower, which is no part of transformers."""
    vision = hf.CLIPVisionConfig(**_VISION, projection_dim=16, model_args={"embed_dim": 16})
    config, processor = _square(
        overrides, name="PerceptionLM", text=hf.LlamaConfig, cell=2 * PATCH, vision=vision, projector_pooling_ratio=2,
        video_token_id=0,
    )  # fmt: skip
    return config, OneTile(
        processor.image_processor, processor.tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
        chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


def _llava_next_video(overrides: dict[str, Any]) -> Made:
    """LLaVA-NeXT-Video: as LLaVA-NeXT where it looks at pictures."""
    tokenizer = _llama_tokenizer()
    config = hf.LlavaNextVideoConfig(
        text_config=hf.LlamaConfig(**_text(tokenizer, overrides)),
        vision_config=hf.CLIPVisionConfig(**_VISION | {"patch_size": 2 * PATCH}, projection_dim=16),
        image_token_index=tokenizer.get_vocab()["<image>"],
        video_token_index=tokenizer.get_vocab()["<unk>"],
        **_TILES,
    )
    return config, hf.LlavaNextProcessor(
        _tile_images(), tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


def _deepseek_vl_hybrid(overrides: dict[str, Any]) -> Made:
    """DeepSeek-VL 7B: SAM, for the picture in a higher resolution, beside SigLIP."""
    tokenizer = _llama_tokenizer(image_token="<image>")
    sam = hf.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=2 * IMAGE_SIZE,
        patch_size=PATCH, global_attn_indexes=[1], window_size=4, mlp_dim=24, num_pos_feats=4,
    )  # fmt: skip
    config = hf.DeepseekVLHybridConfig(
        text_config=hf.LlamaConfig(**_text(tokenizer, overrides)),
        vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
        high_res_vision_config=sam,
        image_token_id=tokenizer.get_vocab()["<image>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    high = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.DeepseekVLHybridImageProcessorPil(size=size, high_res_size=high)
    count = (IMAGE_SIZE // PATCH) ** 2
    return config, hf.DeepseekVLHybridProcessor(
        images, tokenizer, chat_template=tiny.LLAVA_TEMPLATE, num_image_tokens=count
    )


def _ovis2(overrides: dict[str, Any]) -> Made:
    """Ovis2: Qwen2 text, and a tower that says which of a vocabulary of its own a patch is."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = tiny.make_tokenizer(
        f"<unk> <s> </s> <image> <pad> <IMG_ATOM> {' '.join(marks)}", bos="<s>", eos="</s>", pad="<pad>",
        template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip
    text = hf.Qwen2Config(**_text(tokenizer, overrides))
    config = hf.Ovis2Config(
        text_config=text,
        vision_config=hf.Ovis2VisionConfig(**_VISION, vocab_size=37, hidden_stride=2),
        image_token_id=tokenizer.get_vocab()["<IMG_ATOM>"],
        visual_indicator_token_ids=[tokenizer.get_vocab()[mark] for mark in marks],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.Ovis2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    return config, hf.Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=tiny.LLAVA_TEMPLATE)


def _molmo2(overrides: dict[str, Any]) -> Made:
    """Molmo 2: text of its own with scaled and plain rotary positions, features of several layers of the tower."""
    tokenizer = _llama_tokenizer()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    own = {"head_dim": 8, "additional_vocab_size": 8, "rope_scaling_layers": [1, 2, 4]}
    config = hf.Molmo2Config(
        text_config=_text(tokenizer, overrides, **own),
        vision_config=_VISION | heads | {"image_size": [IMAGE_SIZE] * 2},
        adapter_config={"vision_feature_layer": [0, 1], "hidden_size": 16, "intermediate_size": 24,
                        "text_hidden_size": 32, **heads},
        image_patch_id=tokenizer.get_vocab()["<image>"],
    )  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return config, Pooled(
        images, tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
        chat_template=tiny.LLAVA_TEMPLATE,
    )  # fmt: skip


_QWEN3_5: dict[str, Any] = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
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
    "gemma4_unified": _gemma4_unified,
    "llama4": _llama4,
    "cohere2_vision": partial(
        _square, name="Cohere2Vision", text=hf.Cohere2Config, cell=2 * PATCH, own={"sliding_window": 8},
        vision=hf.SiglipVisionConfig(**_VISION, vision_use_head=False), alignment_intermediate_size=24,
    ),
    "minicpmv4_6": partial(_minicpmv, name="MiniCPMV4_6", processor=Slices),
    "minicpmv4_7": partial(_minicpmv, name="MiniCPMV4_7", processor=TypedSlices),
    "granite4_vision": _granite4_vision,
    "perception_lm": _perception_lm,
    "glm4v_moe": partial(_GLM, name="Glm4vMoe", text=_ROUTED | {"head_dim": 16}),
    "exaone4_5": partial(
        _grid, name="Exaone4_5_", processor=Untyped,
        text={"model_type": "exaone4", "rope_parameters": None, "sliding_window": 8, "sliding_window_pattern": 3},
        vision=_MERGED | {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "num_key_value_heads": 2},
    ),
    "deepseek_vl": partial(
        _square, name="DeepseekVL", text=hf.LlamaConfig, cell=PATCH,
        vision=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
    ),
    "deepseek_vl_hybrid": _deepseek_vl_hybrid,
    "llava_next_video": _llava_next_video,
    "ovis2": _ovis2,
    "ernie4_5_vl_moe": partial(
        _grid, name="Ernie4_5_VLMoe", processor=Routed,
        vision={"hidden_size": 16, "intermediate_size": 24, "temporal_merge_size": 2, "temporal_patch_size": 1},
        text={"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2,
              "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [1, 1, 2]}},
    ),
    "molmo2": _molmo2,
    "kimi_k25": partial(
        _grid, name="Kimi_K25", processor=Squares, projection_hidden_size=16,
        vision={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "pos_emb_height": 8, "pos_emb_width": 8, "temporal_patch_size": 1},
        text=_ROUTED | {"model_type": "deepseek_v3", "rope_parameters": None, "q_lora_rank": 16, "kv_lora_rank": 16,
                        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
                        "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "lfm3_vl": partial(
        _grid, name="Lfm3Vl", processor=Untyped,
        vision={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        text={"model_type": "lfm3", "rope_parameters": None, "head_dim": 8, "sliding_window": 8, "layer_types": [
            "conv", "full_attention", "conv", "sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
