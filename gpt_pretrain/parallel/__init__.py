"""The device mesh, partition rules, and where the rows of a batch lie."""
