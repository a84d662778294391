"""LLaVA and what is built like it: tiles, or a square picture, before text of many kinds."""

from functools import partial
from typing import Any

import transformers as hf

from tiny.parts import (
    IMAGE_SIZE,
    LLAVA_TEMPLATE,
    PATCH,
    SMALL,
    SMALL_VISION,
    SQUARE,
    TILES,
    VISION,
    VISION_HIDDEN,
    Made,
    Maker,
    llama_tokenizer,
    make_tokenizer,
    small_text,
    square,
    tile_images,
)
from tiny.processors import OneTile

_COARSE = SMALL_VISION | {"patch_size": 2 * PATCH}
_GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}


def _granite4_vision(overrides: dict[str, Any]) -> Made:
    """Granite Vision 4: features of SigLIP's layers are added in front of the first blocks, and none to the tokens."""
    tokenizer = llama_tokenizer()
    config = hf.Granite4VisionConfig(
        text_config=hf.Granite4VisionTextConfig(**small_text(tokenizer, overrides, **_GRANITE, logits_scaling=2.0)),
        # The width of a head of the window Q-Former is 64, whatever the tower's is.
        vision_config=hf.SiglipVisionConfig(**SMALL_VISION | {"hidden_size": 64}, vision_use_head=False),
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 24,
                        "cross_attention_frequency": 1, "use_qformer_text_input": False},
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2],
        **TILES,
    )  # fmt: skip
    return config, hf.Granite4VisionProcessor(
        tile_images(), tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", downsample_rate="1/2",
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip


def _mistral3(overrides: dict[str, Any], *, merged: int = 2) -> Made:
    """Mistral 3: Mistral text, Pixtral vision of any size, patches `merged`; they are not in Pixtral-12B, a llava."""
    tokenizer = make_tokenizer(
        "<unk> <s> </s> [IMG] [IMG_BREAK] [IMG_END] <pad>", bos="<s>", eos="</s>", pad="<pad>",
        template=LLAVA_TEMPLATE.replace("<image>", "[IMG]"), image_token="[IMG]", image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )  # fmt: skip
    own: dict[str, Any] = {"spatial_merge_size": merged} if merged > 1 else {"vision_feature_select_strategy": "full"}
    patch = PATCH if merged > 1 else 2 * PATCH
    config = (hf.Mistral3Config if merged > 1 else hf.LlavaConfig)(
        text_config=hf.MistralConfig(**small_text(tokenizer, overrides, sliding_window=None, head_dim=8)),
        vision_config=hf.PixtralVisionConfig(**SMALL_VISION | {"image_size": 64, "patch_size": patch}),
        image_token_index=tokenizer.get_vocab()["[IMG]"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **own,
    )
    images = hf.PixtralImageProcessorPil(patch_size=2 * PATCH, size={"longest_edge": 64})
    return config, hf.LightOnOcrProcessor(
        images, tokenizer, patch_size=patch, spatial_merge_size=merged, chat_template=tokenizer.chat_template
    )


def _perception_lm(overrides: dict[str, Any]) -> Made:
    """Perception LM: Llama text, and CLIP in place of timm's tower, which is no part of transformers."""
    vision = hf.CLIPVisionConfig(**SMALL_VISION, projection_dim=16, model_args={"embed_dim": 16})
    config, processor = square(
        overrides, name="PerceptionLM", text=hf.LlamaConfig, cell=2 * PATCH, vision=vision, projector_pooling_ratio=2,
        video_token_id=0,
    )  # fmt: skip
    return config, OneTile(
        processor.image_processor, processor.tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip


MAKERS: dict[str, Maker] = {
    # The CLS token is dropped.
    "llava": partial(
        square, name="Llava", text=hf.LlamaConfig, cell=PATCH, dropped=True, own={},
        vision=hf.CLIPVisionConfig(**VISION, projection_dim=VISION_HIDDEN), image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    ),
    # Patches twice as large as elsewhere: up to five tiles would make too many tokens.
    "llava_next": partial(
        square, name="LlavaNext", text=hf.LlamaConfig, cell=2 * PATCH, dropped=True, own={}, tiles=tile_images(),
        vision=hf.CLIPVisionConfig(**VISION | {"patch_size": 2 * PATCH}, projection_dim=VISION_HIDDEN),
        image_seq_length=(IMAGE_SIZE // (2 * PATCH)) ** 2,
    ),
    "llava_onevision": partial(
        square, name="LlavaOnevision", text=hf.Qwen2Config, cell=2 * PATCH, video_token_index=0,
        vision=hf.SiglipVisionConfig(**_COARSE, vision_use_head=False),
        tiles=hf.LlavaOnevisionImageProcessorPil(size=SQUARE, **TILES),
    ),
    "llava_next_video": partial(
        square, name="LlavaNextVideo", text=hf.LlamaConfig, cell=2 * PATCH, dropped=True, video_token_index=0,
        vision=hf.CLIPVisionConfig(**_COARSE, projection_dim=16), tiles=tile_images(),
    ),
    "vipllava": partial(
        square, name="VipLlava", text=hf.LlamaConfig, cell=PATCH, dropped=True,
        vision=hf.CLIPVisionConfig(**SMALL_VISION, projection_dim=16), vision_feature_layer=[-1, -2],
        image_seq_length=16,
    ),
    "granite_vision": partial(
        square, name="LlavaNext", text=hf.GraniteConfig, cell=2 * PATCH, own=SMALL | _GRANITE, tiles=tile_images(),
        vision=hf.SiglipVisionConfig(**_COARSE, vision_use_head=False), vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
    ),
    "granite4_vision": _granite4_vision,
    "mistral3": _mistral3,
    "pixtral": partial(_mistral3, merged=1),
    "perception_lm": _perception_lm,
}  # fmt: skip
