"""A directory of ONNX graphs: what lies in it, by the layout of onnxruntime-genai, of transformers.js or of optimum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.models.family import Family, families, family_of
from sasa_export.models.shards import Shard

GENAI = "genai_config.json"
ROLES = {
    "decoder": ("decoder_model_merged", "decoder_model", "model"), "embedding": ("embed_tokens",),
    "vision": ("vision_encoder",),
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what configurations call the number of blocks
COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # beside the graphs
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Graphs:
    """An opened directory: `files` are its graphs by role (decoder, embedding, vision), and `weights` what lies beside
    them, both relative to the directory."""

    source: Source
    files: dict[str, str]
    weights: tuple[str, ...]

    @property
    def decoder(self) -> Path:
        return self.source.directory / self.files["decoder"]

    def size(self, *names: str) -> int | None:
        """The first of these numbers that the decoder's configuration names."""
        genai = read_object(self.source.directory / GENAI).get("model", {}).get("decoder", {})
        texts = (self.source.config.get("text_config") or {}, self.source.config, genai)
        return next((text[name] for text in texts for name in names if text.get(name)), None)


def holds_graphs(model: str) -> bool:
    """Is this a directory of ONNX graphs, with no weights for transformers in it?"""
    weights = [path for path in Path(model).glob("*.safetensors") if not path.name.startswith("sasa-")]
    return not weights and bool(_candidates(Path(model), "decoder"))


def open_graphs(model: str, chosen: Sequence[str] = ()) -> Graphs:
    """Find the graphs of a directory, of which `chosen` names variants: by file, or by what a name ends with.

    Raises OpenError, which names the file, where one is missing, or it is not clear which of several is meant.
    """
    directory = Path(model)
    config, genai = read_object(directory / "config.json"), read_object(directory / GENAI).get("model", {})
    if "sasa" in config:
        raise OpenError(f"{model} is a patched model already. Give the model that it was made from.")
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise OpenError(
            f"{model} has no tokenizer ({TOKENIZERS[0]}), so no prompt can be written. Put its files there."
        )
    model_type = config.get("model_type") or genai.get("type")
    if model_type is None:
        raise OpenError(f"{model} has neither a config.json with a model_type nor a {GENAI}. Put one there.")
    files = _of_genai(directory, genai) if genai else _by_names(directory, chosen)
    weights = tuple(sorted({name for file in files.values() for name in _beside(directory, file)}))
    shards = tuple(Shard(directory / name, (), (), ()) for name in (*files.values(), *weights))
    known = any(model_type in family.model_types for family in families().values())
    family = family_of(model_type) if known else Family(model_type, (model_type,))  # as of decoders of text
    family = replace(family, files=COPIED)
    return Graphs(Source(model, directory, {"model_type": model_type, **config}, family, shards), files, weights)


def _of_genai(directory: Path, model: dict[str, Any]) -> dict[str, str]:
    """The graphs that onnxruntime-genai's configuration names."""
    files = {role: str(model[role].get("filename")) for role in ROLES if isinstance(model.get(role), dict)}
    others = [role for role in ("speech", "encoder") if role in model]
    if others or "decoder" not in files:
        raise OpenError(f"{directory / GENAI} has {others[0] if others else 'no decoder'}. Use another model.")
    missing = [name for name in files.values() if not (directory / name).is_file()]
    if missing:
        raise OpenError(f"{directory / missing[0]} is missing, which {GENAI} names. Restore the file.")
    return files


def _by_names(directory: Path, chosen: Sequence[str]) -> dict[str, str]:
    """The graphs by their usual names; beside a decoder, those of its type, where no other is chosen."""

    def names(file: str) -> set[str]:
        return {file, Path(file).name, variant(file) or "fp32"}

    files: dict[str, str] = {}
    there = {role: _candidates(directory, role) for role in ROLES}
    for role, found in there.items():
        meant = [file for file in found if names(file) & set(chosen)]
        if len(meant) != 1:
            meant = meant or found
            meant = [file for file in meant if files and variant(file) == variant(files["decoder"])] or meant
        if len(meant) > 1:
            raise OpenError(f"{directory} has {', '.join(meant)}: choose one of them with --onnx-file.")
        if meant:
            files[role] = meant[0]
        elif role == "decoder":
            raise OpenError(f"{directory} has no decoder ({', '.join(ROLES['decoder'])}, .onnx). Check the path.")
    unknown = sorted(set(chosen).difference(*map(names, files.values())))
    if unknown:
        every = ", ".join(file for found in there.values() for file in found)
        raise OpenError(f"--onnx-file {unknown[0]} is none of the graphs of {directory}, or not the only one: {every}.")
    return files


def _candidates(directory: Path, role: str) -> list[str]:
    """Files of one role: those of the first name that there are any of."""
    for name in ROLES[role]:
        paths = sorted([*directory.glob(f"{name}*.onnx"), *directory.glob(f"onnx/{name}*.onnx")])
        found = [path for path in paths if path.stem == name or path.stem.startswith(f"{name}_")]
        if found:
            return [path.relative_to(directory).as_posix() for path in found]
    return []


def variant(file: str) -> str:
    """What marks a graph's type behind its name, such as q4; empty where nothing does."""
    stem = Path(file).stem
    name = next((name for names in ROLES.values() for name in names if stem.startswith(name)), stem)
    return stem.removeprefix(name).removeprefix("_")


def _beside(directory: Path, file: str) -> Iterator[str]:
    """The files in which a graph has its weights. OpenError where one is missing, or the graph is damaged."""
    import onnx_ir as ir  # a lean installation has none

    try:
        model = ir.load(directory / file)
    except Exception as error:  # protobuf's, the file system's, and those of the graph's reader
        raise OpenError(f"{directory / file} is no graph ({type(error).__name__}). Restore the file.") from None
    stored = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    for location in sorted({str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}):
        name = (Path(file).parent / location).as_posix()
        if ".." in Path(location).parts or not (directory / name).is_file():
            raise OpenError(f"{directory / name} is missing, where {file} has its weights. Restore the file.")
        yield name
