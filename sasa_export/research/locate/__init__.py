"""Find where a model perceives danger, where it understands, and where it begins to speak; propose its layers."""
