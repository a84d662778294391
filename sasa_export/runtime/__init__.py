"""What runs inside a patched model: torch and transformers only, readable alone.

Each file is one idea; `bundle` joins them to the one modeling file that travels in a patched directory.
"""
