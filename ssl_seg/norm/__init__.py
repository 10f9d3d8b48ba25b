"""Normalization layers, and what converts and measures them."""
