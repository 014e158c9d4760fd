"""Compares the output's weights and blocks with the source's."""
