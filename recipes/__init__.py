"""Recipes: the YAML files, their schema and their loader. Knows pydantic, YAML and regex only."""
