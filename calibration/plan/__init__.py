"""What becomes of every tensor: the plan that a run executes and a verification checks."""
