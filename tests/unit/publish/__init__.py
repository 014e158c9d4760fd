"""Tests of publishing: what goes to the hub, and what does not."""
