"""Data contracts, provenance and stores of every result."""
