"""A tiny decoder as a graph of single operators, as an exporter of somebody else's might write it, and faulty ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tiny
from cli_steps import write_lane_probe
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sasa_export import Options
from sasa_export.backends.onnx_graphs import GraphOriginal, read
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.prompts import Prompt

BLOCKS, HIDDEN, HEADS, SIZE, VOCABULARY = 4, 32, 2, 16, 400
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


class Graph:
    """Nodes and weights in the order in which they are made."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def __call__(self, operation: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{operation}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], name=f"/{name}", **attributes))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant((self.random.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32))

    def constant(self, value: NDArray[Any]) -> str:
        name = f"weight.{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def norm(self, states: str) -> str:
        mean = self("ReduceMean", self("Mul", states, states), self.ints(-1), keepdims=1)
        scale = self("Sqrt", self("Add", mean, self.constant(np.array([1e-5], np.float32))))
        return self("Mul", self("Div", states, scale), self.constant(np.ones(HIDDEN, np.float32)))

    def heads(self, states: str) -> str:
        """(batch, heads, tokens, size) of (batch, tokens, hidden)."""
        return self("Transpose", self("Reshape", states, self.ints(0, 0, HEADS, SIZE)), perm=[0, 2, 1, 3])

    def block(self, index: int, states: str, mask: str, positions: str, past: int) -> str:
        normed = self.norm(states)
        query, key, value = (self("MatMul", normed, self.weight(HIDDEN, HIDDEN)) for _ in range(3))
        key = self("Add", key, self("Gather", positions, "position_ids"))
        held = []
        for kind, new in (("key", key), ("value", value)):
            before = f"past_key_values.{past}.{kind}"
            held.append(self("Concat", before, self.heads(new), axis=2, out=f"present.{index}.{kind}"))
        scores = self("MatMul", self.heads(query), self("Transpose", held[0], perm=[0, 1, 3, 2]))
        seen = self("MatMul", self("Softmax", self("Add", scores, mask), axis=-1), held[1])
        joined = self("Reshape", self("Transpose", seen, perm=[0, 2, 1, 3]), self.ints(0, 0, HIDDEN))
        states = self("Add", states, self("MatMul", joined, self.weight(HIDDEN, HIDDEN)))
        inner = self("Tanh", self("MatMul", self.norm(states), self.weight(HIDDEN, HIDDEN)))
        return self("Add", states, self("MatMul", inner, self.weight(HIDDEN, HIDDEN)), out=f"state.{index}")


def mask_of(graph: Graph) -> str:
    """(batch, 1, tokens, total), 0 where a token may look and very negative elsewhere."""
    total = graph("Shape", "attention_mask", start=1, end=2)
    past = graph("Sub", total, graph("Shape", "input_ids", start=1, end=2))
    zero, one = (graph.constant(np.array(value, np.int64)) for value in (0, 1))
    columns = graph("Range", zero, graph("Squeeze", total), one)  # (total,)
    rows = graph("Range", graph("Squeeze", past), graph("Squeeze", total), one)  # (tokens,)
    causal = graph("LessOrEqual", columns, graph("Unsqueeze", rows, graph.ints(1)))  # (tokens, total)
    real = graph("Unsqueeze", graph("Cast", "attention_mask", to=TensorProto.BOOL), graph.ints(1, 2))
    return graph(
        "Where", graph("And", causal, real), *(graph.constant(np.array(value, np.float32)) for value in (0, -1e9))
    )


def decoder(fault: str = "", seed: int = 0) -> onnx.ModelProto:
    """The decoder, or one with a fault that the name says."""
    graph = Graph(seed)
    mask, positions = mask_of(graph), graph.weight(512, HIDDEN)
    states = embedded = graph("Gather", graph.weight(VOCABULARY, HIDDEN), "input_ids")
    for index in range(BLOCKS):
        shared = fault == "shared keys" and index == BLOCKS - 1
        states = graph.block(index, states, mask, positions, past=index - shared)
        if fault == "text again" and index == 2:
            states = graph("Add", states, embedded, out="text.again")
    normed = graph.norm(states)
    if fault == "unknown operator":
        graph.nodes.append(helper.make_node("FlashNorm", [normed], ["flash"], name="/flash", domain="vendor"))
        normed = "flash"
    if fault == "dynamic int8":
        graph.nodes.append(helper.make_node("DynamicQuantizeLinear", [normed], ["q", "s", "z"], name="/rounded"))
        normed = graph("DequantizeLinear", "q", "s", "z")
    logits = graph("MatMul", normed, graph.weight(HIDDEN, VOCABULARY))
    if fault == "soft cap":
        logits = graph("Tanh", logits)
    graph("Identity", logits, out="logits")
    cache: list[tuple[str, list[str | int | None]]] = [
        (f"{index}.{kind}", ["batch", HEADS, "past", SIZE])
        for index in range(BLOCKS - (fault == "shared keys"))
        for kind in ("key", "value")
    ]
    tokens: list[str | int | None] = ["batch", "tokens"]
    inputs: dict[str, tuple[int, list[str | int | None]]] = {
        "input_ids": (INT, tokens),
        "attention_mask": (INT, ["batch", "total"]),
        "position_ids": (INT, tokens),
    }
    inputs |= {f"past_key_values.{name}": (FLOAT, shape) for name, shape in cache}
    if fault == "cross-attention":
        inputs["encoder_hidden_states"] = (FLOAT, ["batch", "seen", HIDDEN])
    outputs: dict[str, tuple[int, list[str | int | None]]] = {"logits": (FLOAT, [*tokens, VOCABULARY])}
    outputs |= {f"present.{name}": (FLOAT, [*shape[:2], "total", SIZE]) for name, shape in cache}
    if fault == "guarded already":
        graph("Identity", normed, out="unsafe_probability")
        outputs["unsafe_probability"] = (FLOAT, ["batch", "tokens", HIDDEN])
    given, made = (
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()]
        for values in (inputs, outputs)
    )
    if fault == "merged":
        branch = helper.make_graph(graph.nodes, "whole", [], made, graph.weights)
        whole = helper.make_node(
            "If", ["always"], [value.name for value in made], name="/merged", then_branch=branch, else_branch=branch
        )
        always = helper.make_node("Constant", [], ["always"], value=numpy_helper.from_array(np.array(True)))
        model = helper.make_graph([always, whole], "decoder", given, made)
    else:
        model = helper.make_graph(graph.nodes, "decoder", given, made, graph.weights)
    return helper.make_model(
        model, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("vendor", 1)], ir_version=8
    )


def write(directory: Path, fault: str = "", name: str = "model.onnx") -> Path:
    """A directory as optimum writes one, its weights in a file beside the graph."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    data = f"{path.name}_data"
    onnx.save(decoder(fault), path, save_as_external_data=True, location=data, size_threshold=256)
    tokenizer = tiny.make_tokenizer("<pad> <s> </s>", bos=None, eos="</s>", pad="<pad>", template=TEMPLATE)
    tokenizer.save_pretrained(directory)
    config = {
        "model_type": "llama", "num_hidden_layers": BLOCKS, "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def run(model: ir.Model, given: dict[str, Any], values: list[ir.Value]) -> list[Any]:
    """The values in a first call on token ids."""
    import onnxruntime

    for number, value in enumerate(values):
        node = ir.Node("", "Identity", [value], name=f"out{number}")
        node.outputs[0].name, node.outputs[0].type = f"out{number}", ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    held = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(held, providers=["CPUExecutionProvider"])
    count = given["input_ids"].shape[1]
    feed = {"attention_mask": np.ones((1, count), np.int64), "position_ids": np.arange(count)[None], **given}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((1, HEADS, 0, SIZE), np.float32)
    return session.run([f"out{number}" for number in range(len(values))], feed)


def probe_amid(original: GraphOriginal, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A random probe with a threshold amid the prompts, and P(unsafe) of these, in two passes of the original graph."""
    weight = np.random.default_rng(1).normal(size=HIDDEN).astype(np.float32)
    states = read(original.lanes(LaneSettings(1, 2, tokens=64), alone=True), prompts, ["projected"])[
        "projected"
    ]  # (prompts, hidden)
    bias = -float(np.median(states @ weight))
    return {"weight": weight, "bias": bias, "expected": 1 / (1 + np.exp(-(states @ weight + bias)))}


def options(source: Path, place: Path, weight: Any = None, bias: float = 0.0, **settings: Any) -> Options:
    """Of a patch of such a directory to place/out, by a probe of `weight` (hidden,) on the end of the lane alone."""
    probe = write_lane_probe(place / "probe", np.ones(HIDDEN) if weight is None else weight, HIDDEN, bias)
    layers: dict[str, Any] = {"safety_layer": 1, "semantic_layer": 2, "lane_tokens": 64}
    return Options(model=str(source), out=place / "out", probe=probe, **(layers | settings))
