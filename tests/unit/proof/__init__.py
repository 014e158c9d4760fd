"""Tests of the proof: what is derived again, and what is found."""
