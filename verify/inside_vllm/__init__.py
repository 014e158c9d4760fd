"""Code that runs inside vLLM's own interpreter; imports nothing of this project."""
