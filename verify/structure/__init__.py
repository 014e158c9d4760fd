"""Whether a checkpoint holds what its config promises, read byte by byte."""
