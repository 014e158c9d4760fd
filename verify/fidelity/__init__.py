"""Whether the output's weights and blocks do what the source's do."""
