"""`python -m workflows.compare`: finished runs of one source side by side."""
