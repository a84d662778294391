"""Writes patched models: a safetensors directory for transformers, or an ONNX directory for any runtime."""
