"""Which tokens make which batch: sources, order, loader."""
