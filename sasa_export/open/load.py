"""Load a source: its stock model and processor, or the bare skeleton that tracing needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.open import Source


def stock_classes(source: Source) -> tuple[type, type]:
    """The stock configuration class and ...ForConditionalGeneration class of a source."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(source.directory)
    return type(config), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def load_model(source: Source, *, dtype: str, device: str) -> Any:
    """The stock model, evaluated, on `device`. OpenError where weights are missing, unexpected or NaN."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source.directory, dtype=_dtype(dtype), device_map=device, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OpenError(f"{source.name} could not be loaded ({str(error).strip().splitlines()[0][:300]}).") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            first = sorted(str(key) for key in info[problem])[0]
            raise OpenError(
                f"{source.name} has {len(info[problem])} {problem.replace('_', ' ')} ({first}). "
                "The files do not belong together: restore them from their source."
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise OpenError(f"{source.name} has NaN or infinity in {name}. Restore the weights from their source.")
    return model.eval()


def load_processor(source: Source) -> Any:
    """The stock processor, padding on the left, as generation wants it."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.directory)
    except (OSError, ValueError, ImportError) as error:
        raise OpenError(
            f"{source.name} has no usable processor ({str(error).strip().splitlines()[0][:300]})."
        ) from None
    if not hasattr(processor, "image_processor") or getattr(processor, "chat_template", None) is None:
        raise OpenError(f"{source.name} has no image processor or no chat template, so its prompts cannot be written.")
    processor.tokenizer.padding_side = "left"
    return processor


@contextmanager
def skeleton(source: Source) -> Iterator[Any]:
    """The stock model with fake weights: shapes alone, no memory. Runs only within the context."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    _, model_class = stock_classes(source)
    config = AutoConfig.from_pretrained(source.directory)
    with FakeTensorMode():
        with no_init_weights():
            model = model_class(config).eval()
        yield model


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
