"""What happens around the steps of a run. To add one: a file here and a line in `actions_of`."""
