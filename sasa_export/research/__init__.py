"""Study a model: find its layers, and measure what a patched model refuses and answers."""
