"""Devices, clusters of them, and gangs of ranks that run on a cluster together."""
