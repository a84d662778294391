"""Writing patched models: a safetensors directory for transformers, an ONNX directory for any runtime."""
