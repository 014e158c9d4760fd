"""What a run keeps outside its output: journal, resume, ranks, disk and memory."""
