"""The transformers model whose blocks are filled from the source one at a time; proof that it computes the same."""
