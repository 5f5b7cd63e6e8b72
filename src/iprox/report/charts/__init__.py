"""The charts of the report; each function returns a `Chart`."""
