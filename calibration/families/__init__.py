"""The model families: names of their tensors, groups of tensors, and the tensors that a config promises."""
