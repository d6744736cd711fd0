"""Execute a program on the ranks of a gang, and tell what happened when."""
