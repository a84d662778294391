"""What a gate would do on prompts as they come, which have no labels, and which threshold suits them."""
