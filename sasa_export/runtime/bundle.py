"""Joins the files of this directory, and classes for one family, into the modeling file of a patched directory."""

import ast
from pathlib import Path

MODELING_FILE = "modeling_sasa.py"
MLX_FILE = "modeling_sasa_mlx.py"

# Each part uses only the parts before it. `version` precedes even the imports of all others.
PARTS = ("version", "arrays", "formulas", "settings", "ledger", "host", "verdict", "lane", "guard", "proof", "model")

_ARRAYS, *_MLX = (f"../runtime_mlx/{part}" for part in ("arrays", "guard", "model"))
MLX_PARTS = (_ARRAYS, "settings", "verdict", *_MLX)  # settings and verdict serve both

HEADER = '''\
"""A vision-language model that carries its own guard (SASA, arXiv 2507.21637), and judges every prompt with it.

From top to bottom: formulas, settings, what the cache keeps for the gate, what is read of transformers, when a verdict
is due, the second lane, the gate, its proof, the classes. `config.sasa["graph"]` lists the steps, of any model family.

What it changes outside itself:
- the classes of the loaded model's decoder and blocks, to some of the same names that show their calls (`watch`);
- the stock class's `__init__`: handed a guarded configuration, it raises (`refuse_guarded_configurations`);
- transformers' AutoConfig, list of multimodal models and renaming of old weights, by an entry each (at the end).
"""
'''

MLX_HEADER = '''\
"""A vision-language model that carries its own guard (SASA, arXiv 2507.21637), in mlx-vlm: config.json names this file.

From top to bottom: formulas, settings, when a verdict is due, the gate and what the cache keeps for it, the classes.
What it changes outside itself: the classes of the loaded model's decoder, tapped blocks and language model; and how
mlx-vlm loads this directory's processor (at the end).
"""
'''

FOOTER = """
from transformers import AutoConfig, GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from {config_module} import {config_class}
from {model_module} import {model_class}


class Sasa{config_class}(GuardedConfig, {config_class}):
    model_type = "{model_type}"


# Without GenerationMixin among its bases transformers makes another class of it, which pickle does not find.
class Sasa{model_class}(GuardedModel, {model_class}, GenerationMixin):
    config_class = Sasa{config_class}
    forward = guarded({model_class}.forward)
    prepare_inputs_for_generation = requested({model_class})


rename_old_keys("{model_type}", {model_class})
refuse_guarded_configurations({model_class})
AutoConfig.register("{model_type}", Sasa{config_class}, exist_ok=True)
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["{model_type}"] = "Sasa{model_class}"  # where `transformers serve` looks
"""


def guarded_type(model_type: str) -> str:
    """Return the model_type of a patched model, given its family's."""
    return f"sasa_{model_type}"


def modeling_source(config: type, model: type) -> str:
    """Return the modeling file of one family: the runtime, then classes derived from the family's stock classes."""
    texts = _texts(PARTS)
    version, *others = (_section(part, text) for part, text in texts.items())
    family = FOOTER.format(
        config_module=config.__module__,
        config_class=config.__name__,
        model_module=model.__module__,
        model_class=model.__name__,
        model_type=guarded_type(config.model_type),  # type: ignore[attr-defined]
    )
    start = f"{HEADER}\nimport transformers\n\n{version}\n{_imports(list(texts.values())[1:])}"
    return "\n".join([start, *others, f"{_title('the family')}\n{family}"])


def mlx_source() -> str:
    """Return the modeling file for mlx-vlm. It is the same for every family."""
    texts = _texts(MLX_PARTS)
    sections = [_section(Path(part).name, text) for part, text in texts.items()]
    return "\n".join([MLX_HEADER, _imports(list(texts.values())), *sections])


def _texts(parts: tuple[str, ...]) -> dict[str, str]:
    return {part: (Path(__file__).parent / f"{part}.py").read_text(encoding="utf-8") for part in parts}


def _section(part: str, text: str) -> str:
    """Return a part without its imports, with its docstring as a comment."""
    tree = ast.parse(text)
    begin = max(node.end_lineno or 0 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    said = "\n".join(f"# {line}".rstrip() for line in (ast.get_docstring(tree) or "").splitlines())
    body = "\n".join(text.splitlines()[begin:]).strip("\n").replace("\n\n\n", "\n\n")
    apart = "\n" if body.startswith("#") else ""
    return f"{_title(part)}\n{said}\n{apart}{body}\n"


def _title(text: str) -> str:
    return f"# {text} ".ljust(119, "-")


def _imports(texts: list[str]) -> str:
    """Return all imports of the parts once, except `import transformers` and imports from sasa_export."""
    nodes = [node for text in texts for node in ast.parse(text).body]
    aliases = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    whole = {ast.unparse(alias) for alias in aliases} - {"transformers"}
    named: dict[str, set[str]] = {}  # module -> names
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("sasa_export."):
            named.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    lines = [f"import {name}" for name in sorted(whole)]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items())]
    return "\n".join(lines) + "\n"
