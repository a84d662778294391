"""Find the blocks where a model perceives danger, understands, and begins to speak. Propose its layers."""
