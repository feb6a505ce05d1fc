"""Learning-rate schedules and optimizers, one file an optimizer."""
