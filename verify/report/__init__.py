"""Shows verdicts as tables, pages and plots."""
