"""Who computes what: layouts, shares, strategies, and the program they compile to."""
