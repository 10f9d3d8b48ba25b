"""Exported weights: written, found, matched and checked."""
