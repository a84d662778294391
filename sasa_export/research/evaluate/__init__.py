"""Evaluate a gate: what it catches and what it costs, with all arms on the same prompts, and with intervals."""
