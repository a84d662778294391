"""Passes on an exported onnx-ir model: one file, one idea each."""
