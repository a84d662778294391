"""Stand-ins for processors that insist on torchvision: as many image tokens, and the same inputs of the model."""

from typing import Any

import numpy as np
import torch
import transformers as hf

from tiny.parts import PATCH


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
        numbers = torch.arange(side * side).reshape(side // 2, 2, side // 2, 2)  # of one picture's patches
        found = {
            "pixel_values": patches,
            "image_token_pooling": numbers.transpose(1, 2).reshape(-1, 4).repeat(count, 1),
            "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]] * count),
            "image_num_crops": torch.ones(count, dtype=torch.long),
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
