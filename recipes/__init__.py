"""Recipes: the YAML files, their schema and their loader. Knows pydantic and YAML only."""
