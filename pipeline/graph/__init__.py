"""A model as operations, and what each of them does to a layout."""
