"""Runs as jobs of submitit, on Slurm or on this machine."""
