"""Proof: every byte of a checkpoint derived again from its source and its recipe, without calibrating again."""
