"""Brings a verified output to the hub."""
