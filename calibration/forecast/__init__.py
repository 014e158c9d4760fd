"""What a run costs, told before it starts."""
