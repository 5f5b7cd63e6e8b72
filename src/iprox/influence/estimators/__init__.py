"""Estimators of influence, one file per method (`registry` lists them by name)."""
