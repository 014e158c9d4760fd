"""Calibration data as people have it, made into batches of token ids."""
