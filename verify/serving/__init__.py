"""What the real vLLM makes of a checkpoint."""
