"""Gemma 3 and 4."""

from typing import Any

import transformers as hf

from tiny.parts import (
    LLAVA_TEMPLATE,
    SQUARE,
    VISION,
    Made,
    Maker,
    llama_tokenizer,
    make_tokenizer,
    small_text,
    text_fields,
)
from tiny.processors import SoftTokens

_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _gemma3(overrides: dict[str, Any]) -> Made:
    """Gemma 3: sliding and full layers, attention both ways within an image, SigLIP vision."""
    tokenizer = make_tokenizer(
        "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>",
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        template=_GEMMA_TEMPLATE,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    ids = tokenizer.get_vocab()
    full, sliding = "full_attention", "sliding_attention"
    own: dict[str, Any] = {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        # Narrower than the prompts, or sliding layers would see what full ones see.
        "sliding_window": 8,
        # No regular period: a lane that starts counting the kinds at its own first block goes wrong.
        "layer_types": [sliding, full, sliding, sliding, full, sliding],
        "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]],
    }
    text = text_fields(tokenizer, own | overrides)
    text["layer_types"] = text["layer_types"][: text["num_hidden_layers"]]
    side = 2
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=side**2,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", True),
    )
    images = hf.Gemma3ImageProcessorPil(size=SQUARE, image_seq_length=side**2)
    return config, hf.Gemma3Processor(images, tokenizer, chat_template=_GEMMA_TEMPLATE, image_seq_length=side**2)


def _gemma4(overrides: dict[str, Any]) -> Made:
    """Gemma 4: sliding and full blocks with heads of different sizes, patches of any number, capped logits."""
    tokenizer = llama_tokenizer()
    ids = tokenizer.get_vocab()
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    own: dict[str, Any] = {
        "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "sliding_window": 8, "layer_types": kinds, "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "final_logit_softcapping": 2.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3,
        "position_embedding_size": 64,
    }  # fmt: skip
    config = hf.Gemma4Config(
        text_config=small_text(tokenizer, own | overrides), vision_config=vision, audio_config=None,
        image_token_id=ids["<image>"],
        **dict.fromkeys(("video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id"), ids["<unk>"]),
    )  # fmt: skip
    images = hf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    return config, SoftTokens(images, tokenizer, chat_template=LLAVA_TEMPLATE)


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
    return unified, SoftTokens(images, processor.tokenizer, chat_template=LLAVA_TEMPLATE)


MAKERS: dict[str, Maker] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
}  # fmt: skip
