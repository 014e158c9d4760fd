"""Executes a plan without calibration, shard by shard."""
