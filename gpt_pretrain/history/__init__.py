"""What a run has consumed and will consume: what `replay` and `inspect` answer with."""
