"""Reads calibration data in the forms people have it, and turns it into batches of token ids."""
