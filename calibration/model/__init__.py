"""The transformers model, filled from the source one block at a time, and proof that it computes the same as the
original."""
