"""Studying a model: where its layers lie, and what a patched one refuses and answers."""
