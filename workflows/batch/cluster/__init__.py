"""A batch on Slurm, through submitit."""
