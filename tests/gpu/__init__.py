"""What is measured on a machine with a GPU, packed so that a bare one runs it in one command. See README.md."""
