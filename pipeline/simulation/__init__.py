"""The same program under cost curves and link models instead of devices and links."""
