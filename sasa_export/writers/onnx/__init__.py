"""A guarded directory to ONNX graphs that any runtime loads and that judge each prompt themselves."""

# Types, and how runtimes mark each in the names of the graphs.
SUFFIX = {"float32": "", "float16": "_fp16", "int8": "_int8", "int4": "_q4"}
VISION, EMBEDDING, DECODER = GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
MERGING = "embed_tokens_and_features"  # beside these, for onnxruntime-genai
