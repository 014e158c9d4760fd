"""What a model family calls its tensors, which of them belong together, and which its config promises."""
