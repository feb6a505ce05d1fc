"""What a run will need and how fast it can be, from its compiled step alone: for devices that need not be here."""
