"""What a run needs besides arithmetic: its journal, resume, ranks, disk and memory."""
