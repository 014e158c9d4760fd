"""Verdicts as tables, pages and plots."""
