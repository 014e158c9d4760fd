"""Many recipes, unattended: `python -m workflows.batch`."""
