"""A tiny LLaVA in which danger, meaning and words appear at known blocks, so that locating them can be judged.

Its blocks pass everything on but for a few attention heads that average, over all tokens before, one coordinate of the
state and write it into another:

    block 0, head 0    drown    a number that each word has by chance
    block 2, head 3    undrown  the same number, the other way round
    block 2, head 1    danger   how often the text says "Z"
    block 3, head 2    drown    another such number
    block 5, head 0    meaning  the topic, which a letter of the text or the colour of the picture gives
    block 7, head 3    undrown  that number twice, the other way round
    block 7, head 1    voice    the same for all: from here on the head's likeliest tokens are words

So harmful and harmless texts are cleanly separable behind block 2 alone. A second lane that starts behind block 2
adds the number of block 3 once more, so that it cancels with that of block 7, and its last state is separable again.
One that starts later keeps that number, and one that starts earlier takes off the number of block 0, which it never
added.
"""

import json
import random
from pathlib import Path
from typing import Any

import tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

BLOCKS, HIDDEN, HEADS = 8, 32, 4
SAFETY, SEMANTIC, VOICE = 2, 5, 7

# Coordinates of the hidden state.
BASE, HARM, TOPIC, DANGER, MEANING, SPOKEN, CHANCE, OTHER_CHANCE = 0, 1, 2, 5, 6, 9, 10, 11
LOUD = 32.0  # what every token has at BASE

COLOURS = {
    "Q": (255, 0, 0), "W": (0, 255, 0), "X": (0, 0, 255), "Y": (255, 255, 0), "V": (0, 255, 255), "J": (255, 0, 255),
}  # fmt: skip
CARRIER = "look at the picture"
FILLERS = ("please", "tell", "me", "where", "the", "dog", "river", "house", "rain", "rice", "water", "table", "chair")


def build(directory: Path) -> Path:
    """Write the model into `directory`."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    tiny.build("llava", directory, num_hidden_layers=BLOCKS, **sizes)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        _see_colours(model)
        _give_words_numbers(model, processor)
        _plant(model, 0, 0, OTHER_CHANCE, DANGER, 100.0)
        _plant(model, 2, 3, OTHER_CHANCE, DANGER, -100.0)
        _plant(model, 2, 1, HARM, DANGER, 4.0)
        _plant(model, 3, 2, CHANCE, DANGER, 100.0)
        for axis in range(3):
            _plant(model, 5, 0, TOPIC + axis, MEANING + axis, 40.0, slot=axis)
        _plant(model, 7, 3, CHANCE, DANGER, -200.0)
        _plant(model, 7, 1, BASE, SPOKEN, 8.0)
        _give_words_voice(model, processor)
    model.save_pretrained(directory)
    return directory


def write_set(path: Path, pairs: int, *, pictures: bool = True) -> str:
    """A JSONL file of pairs of a harmful and a harmless text on one topic, and of pictures of the topic's colour."""
    draw, lines = random.Random(0), []
    for pair in range(pairs):
        letter = list(COLOURS)[pair % len(COLOURS)]
        fillers, group = draw.choices(FILLERS, k=5), f"pair {pair}"
        for label, word in ((1, "Z"), (0, "K")):
            text = " ".join([*fillers, letter, letter, word, word])
            lines.append({"prompt": text, "label": label, "group": group})
        if pictures:
            _picture(letter).save(path.with_name(f"{letter}.png"))
            image = {"image": f"{letter}.png", "prompt": CARRIER, "question": text}
            lines.append({**image, "label": 0, "group": group})
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def _picture(letter: str) -> Image.Image:
    return Image.new("RGB", (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), COLOURS[letter])


def _plant(model: Any, block: int, head: int, read: int, write: int, gain: float, slot: int = 0) -> None:
    """A head that averages coordinate `read` over the tokens so far and adds it to coordinate `write`."""
    attention = model.model.language_model.layers[block].self_attn
    place = head * (HIDDEN // HEADS) + slot
    attention.v_proj.weight[place, read] = 1.0
    attention.o_proj.weight[write, place] = gain


def _see_colours(model: Any) -> None:
    """Each patch's mean red, green and blue go through the tower unchanged and end at TOPIC."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    patches = getattr(tower, "vision_model", tower).embeddings.patch_embedding
    for axis in range(3):
        patches.weight[axis, axis] = 1.0 / tiny.PATCH**2
        # gelu(x) - gelu(-x) = x
        projector.linear_1.weight[2 * axis, axis], projector.linear_1.weight[2 * axis + 1, axis] = 1.0, -1.0
        projector.linear_2.weight[TOPIC + axis, 2 * axis : 2 * axis + 2] = torch.tensor([1.0, -1.0])
    projector.linear_2.bias[BASE] = LOUD


def _give_words_numbers(model: Any, processor: Any) -> None:
    table = model.get_input_embeddings().weight  # (vocabulary, hidden)
    ids = processor.tokenizer.get_vocab()
    table[:, BASE] = LOUD
    draw = torch.Generator().manual_seed(0)
    for word in FILLERS:
        pieces = processor.tokenizer.encode(f" {word}", add_special_tokens=False)
        for place in (CHANCE, OTHER_CHANCE):
            table[pieces, place] = torch.randn(len(pieces), generator=draw)
    table[ids["Z"], HARM] = LOUD
    for letter in COLOURS:
        table[ids[letter], TOPIC : TOPIC + 3] = _topic(model, processor, letter)  # (3,)


def _topic(model: Any, processor: Any, letter: str) -> Tensor:
    """What the picture of a letter's colour gives at TOPIC: (3,)."""
    pixels = processor.image_processor(_picture(letter), return_tensors="pt")["pixel_values"]
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # (1, patches, 32)
    return model.model.multi_modal_projector(hidden)[0].mean(0)[TOPIC : TOPIC + 3]


def _give_words_voice(model: Any, processor: Any) -> None:
    """Words answer to SPOKEN, everything else to BASE, and each token in its own way to DANGER."""
    from sasa_export.layers.capabilities import is_readable, token_texts

    head = model.get_output_embeddings().weight  # (vocabulary, hidden)
    head[:, DANGER] = torch.randn(head.shape[0], generator=torch.Generator().manual_seed(1))
    readable = torch.tensor([is_readable(text) for text in token_texts(processor.tokenizer, head.shape[0])])
    head[:, BASE] = torch.where(readable, -1.0, 1.0)
    head[:, SPOKEN] = torch.where(readable, 4.0, 0.0)
