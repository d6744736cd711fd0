"""What devices and links can do, measured."""
