"""One run: its configuration, what is compiled for it, the loop, its actions and checkpoints."""
