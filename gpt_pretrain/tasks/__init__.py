"""What a model is asked beside its loss: tasks from files, and those of lm-evaluation-harness."""
