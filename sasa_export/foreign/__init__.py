"""Guarding ONNX graphs that others exported: graph in, graph out, with no torch model of their weights.

The second lane is a clone of the graph's own blocks, which shares every weight; the gate is the Guard of `runtime/`,
exported once around a placeholder and spliced in.
"""
