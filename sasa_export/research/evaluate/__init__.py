"""Evaluate: does the gate work, against what, at what price; with every arm on the same prompts, and all intervals."""
