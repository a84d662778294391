"""Drives decoders that others exported, guarded or not, with plain onnxruntime; and their oracles.

An oracle is two passes, of which nothing is shared with the product: in torch on the weights that the graph was made
of, or, where the graph rounds these, in the graph itself, cut by the names that its exporter gives its nodes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import torch
from numpy.typing import NDArray
from onnx import helper
from onnx_runner import KINDS, Runner, session

Array = NDArray[Any]
Pair = tuple[int, int]
# Where decoders of text keep their blocks, as oracle.BLOCKS has it for models with vision.
TEXT_BLOCKS = dict.fromkeys(("bloom", "falcon", "gpt2"), "transformer.h")

# Norms that add two values first, and how many weights the norm itself has.
SCALES = {"SkipSimplifiedLayerNormalization": 1, "SkipLayerNormalization": 2}


class Decoder(Runner):
    """A batch of conversations: `call` feeds tokens of all rows. Then `logits` is (batch, tokens, vocabulary), and
    `probability` (batch,), or None where the decoder is not guarded."""

    def __init__(self, directory: Path, *, decoder: bytes | None = None, exact: bool = False) -> None:
        found = [path for name in ("onnx/decoder_model_merged.onnx", "model.onnx") for path in directory.glob(name)]
        self.path, self.size = found[0], _head_size(directory)
        self.use(session(decoder or self.path, self.path.parent, exact))
        embeddings = [*directory.glob("onnx/embed_tokens.onnx"), *directory.glob("embed_tokens.onnx")]
        self.embedding: Any = session(embeddings[0], self.path.parent, exact) if embeddings else None

    def call(self, ids: Array, mask: Array | None = None, **more: Array) -> None:  # type: ignore[override]
        """Feed tokens (batch, tokens), of which those are padding where `mask` is 0."""
        mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], axis=1)
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -ids.shape[1] :]  # (batch, tokens)
        if "position_ids" in self.inputs and len(self.inputs["position_ids"].shape) > 2:
            positions = np.stack([positions] * 3)
        text = self.embed(ids) if "inputs_embeds" in self.inputs else ids
        self.feed(text, mask, more.pop("position_ids", positions), **more)

    def choose(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, as beam search does."""
        self.mask, self.logits = self.mask[rows], self.logits[rows]
        self.cache = {name: value[rows] for name, value in self.cache.items()}

    def answer(self, tokens: int) -> list[int]:
        """Greedily, of a conversation of one row; the last token is not fed."""
        said: list[int] = []
        while True:
            said.append(int(self.logits[0, -1].argmax()))
            if len(said) == tokens:
                return said
            self.call(np.array([said[-1:]]))


def _head_size(directory: Path) -> int:
    genai = directory / "genai_config.json"
    if genai.exists():
        return int(json.loads(genai.read_text())["model"]["decoder"]["head_size"])
    config = json.loads((directory / "config.json").read_text())
    text = config.get("text_config", config)
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


class TorchOracle:
    """Two passes of a transformers model, by hooks, in float32."""

    def __init__(self, model: Any) -> None:
        kind = model.config.model_type
        if not hasattr(model.config, "vision_config"):
            oracle.BLOCKS[kind] = TEXT_BLOCKS.get(kind, "model.layers")
        self.model = model

    @torch.no_grad()
    def end(self, ids: Sequence[int], pair: Pair) -> tuple[Array, Array]:
        """Where the second lane ends at a prompt's last token: what the head is given (hidden,), and its logits."""
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        seen = oracle.block_outputs(self.model, inputs, pair)
        projected = oracle.project(seen[pair[0]], seen[pair[1]])  # (1, tokens, hidden)
        states: list[torch.Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: states.append(given[0]))
        try:
            logits = oracle.logits_with_state(self.model, inputs, pair[0], projected)  # (1, vocabulary)
        finally:
            handle.remove()
        return states[-1][0, -1].numpy(), logits[0].numpy()


class GraphOracle:
    """Two passes of a graph of a Llama's decoder, itself: one that shows two blocks' outputs, one that is given one."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.directory, self.pair = directory, pair
        path = Decoder(directory).path
        first, second = onnx.load(path, load_external_data=False), onnx.load(path, load_external_data=False)
        names = [_state(first, block) for block in pair]
        self.first = self._session(first, names)
        self.state = names[0]
        head = _head_input(second)
        self.second = self._session(_begun_with(second, names[0]), [head, "logits"])
        self.names, self.head = names, head

    def _session(self, model: onnx.ModelProto, outputs: list[str]) -> Decoder:
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
        return Decoder(self.directory, decoder=model.SerializeToString())

    def plain(self, ids: Sequence[int]) -> Array:
        """What the head is given by the graph as it was, (hidden,)."""
        stock = self._session(onnx.load(self.first.path, load_external_data=False), [self.head])
        stock.start(1)
        stock.call(np.array([ids]))
        return stock.values[self.head][0, -1].astype(np.float32)

    def end(self, ids: Sequence[int], pair: Pair, reach: int | None = None) -> tuple[Array, Array]:
        """Where the second lane ends, as TorchOracle says it; one over the last `reach` tokens, where that is given."""
        assert pair == self.pair
        self.first.start(1)
        self.first.call(np.array([ids]))
        safety, semantic = (self.first.values[name].astype(np.float32) for name in self.names)  # (1, tokens, hidden)
        projected = project(safety, semantic)
        self.second.start(1)
        given = projected.astype(KINDS[self.second.inputs["state"].type])
        last = slice(0 if reach is None else max(len(ids) - reach, 0), None)
        places = {"position_ids": np.arange(len(ids))[None, last]} if "position_ids" in self.second.inputs else {}
        self.second.call(np.array([ids[last]]), state=given[:, last], **places)
        ends = (self.second.values[name][0, -1].astype(np.float32) for name in (self.head, "logits"))
        return next(ends), next(ends)


class RandomProbe:
    """A random probe on the second lane's end, or on its logits, by which an oracle tells some prompts from others."""

    def __init__(self, oracle: Any, rows: Sequence[Sequence[int]], pair: Pair, *, logits: bool = False) -> None:
        self.oracle, self.pair, self.part = oracle, pair, int(logits)
        ends = np.stack([self.end(ids) for ids in rows])  # (prompts, features)
        weight = np.asarray(np.random.default_rng(0).normal(size=ends.shape[1]), np.float32)
        raw = ends @ weight  # (prompts,)
        scale = 2 / max(float(raw.std()), 1e-6)
        self.weight, self.bias = weight * scale, float(-raw.mean() * scale)
        self.expected = [self.judge(ids) for ids in rows]
        ordered = np.sort(self.expected)
        widest = int(np.diff(ordered).argmax())
        self.threshold = float(ordered[widest : widest + 2].mean())

    def end(self, ids: Sequence[int], *reach: int) -> Array:
        found: Array = self.oracle.end(ids, self.pair, *reach)[self.part]
        return found

    def judge(self, ids: Sequence[int], *reach: int) -> float:
        """P(unsafe) of a prompt; of a lane over its last `reach` tokens, where that is given."""
        return float(1 / (1 + np.exp(-(self.end(ids, *reach) @ self.weight + self.bias))))


def project(safety: Array, semantic: Array) -> Array:
    """The projection, (1, tokens, hidden), summed up as onnxruntime does: one bit more or less in it changes how the
    products of 4 bits round, and, thirty blocks on, P(unsafe) by some hundredths."""
    steps = [
        ("Mul", ["safety", "semantic"], "along"), ("ReduceSum", ["along", "last"], "inner"),
        ("Mul", ["semantic", "semantic"], "squares"), ("ReduceSum", ["squares", "last"], "square"),
        ("Max", ["square", "least"], "divisor"), ("Div", ["inner", "divisor"], "share"),
        ("Mul", ["share", "semantic"], "projection"),
    ]  # fmt: skip
    given = [helper.make_tensor_value_info(name, 1, [None, None, None]) for name in ("safety", "semantic")]
    out = helper.make_tensor_value_info("projection", 1, [None, None, None])
    constants = {"last": np.array([-1]), "least": np.array(oracle.EPS, np.float32)}
    graph = helper.make_graph(
        [helper.make_node(op, names, [name]) for op, names, name in steps], "projection", given, [out],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    found: Array = session(model.SerializeToString()).run(None, {"safety": safety, "semantic": semantic})[0]
    return found


def _producers(model: onnx.ModelProto) -> dict[str, Any]:
    return {name: node for node in model.graph.node for name in node.output}


def _state(model: onnx.ModelProto, block: int) -> str:
    """The name of what a block puts out; a fused norm of the builder's is made to show its sum."""
    if f"state.{block}" in _producers(model):  # those of foreign_graphs
        return f"state.{block}"
    by_name = {node.name: node for node in model.graph.node}
    name = f"/model/layers.{block}/Add_1"  # optimum's
    if name in by_name:
        return str(by_name[name].output[0])
    following = f"/model/layers.{block + 1}"
    names = (f"{following}/input_layernorm/SkipLayerNorm", f"{following}/final_norm_layernorm/SkipLayerNorm")
    (fused,) = (by_name[name] for name in names if name in by_name)
    if len(fused.output) == 1:
        fused.output.extend(["", "", f"{fused.name}/sum"])
    return str(fused.output[3])


def _head_input(model: onnx.ModelProto) -> str:
    """What the product that ends in the logits is given."""
    producers, name = _producers(model), "logits"
    while not producers[name].op_type.startswith("MatMul"):
        name = producers[name].input[0]
    return str(producers[name].input[0])


def _begun_with(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same graph, in which an input "state" has the place of this value."""
    fused = _producers(model)[name] if name in _producers(model) else None
    if fused is None:  # the sum of a fused norm that does not show it yet
        (fused,) = (node for node in model.graph.node if node.name == name.removesuffix("/sum"))
    for node in model.graph.node:
        if node is not fused:
            node.input[:] = ["state" if given == name else given for given in node.input]
    if fused.op_type in SCALES:  # kept, since a norm of another kernel rounds otherwise
        position = list(model.graph.node).index(fused)
        fused.input[:] = ["state", "nothing", *fused.input[2 : 2 + SCALES[fused.op_type]]]
        del fused.output[1:]
        model.graph.node.insert(position, helper.make_node("Sub", ["state", "state"], ["nothing"]))
    past = next(value for value in model.graph.input if value.name.startswith("past"))
    kind = past.type.tensor_type.elem_type
    model.graph.input.append(helper.make_tensor_value_info("state", kind, ["batch_size", "sequence_length", None]))
    return model


def padded(rows: Sequence[Sequence[int]], side: str, pad: int) -> tuple[Array, Array]:
    """Rows of different lengths as one batch: ids and mask, (batch, tokens) each."""
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), pad), np.zeros((len(rows), longest), np.int64)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), longest) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask
