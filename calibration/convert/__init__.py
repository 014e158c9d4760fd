"""Conversion without calibration: a plan executed shard by shard."""
