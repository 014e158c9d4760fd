"""Recipes: the YAML files, their schema and their loader. Imports only pydantic, YAML and regex."""
