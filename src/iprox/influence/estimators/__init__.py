"""Estimators of influence: one file per method (`registry` has them by name)."""
