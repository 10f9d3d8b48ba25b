"""Charts, vector graphics and picture sheets; they know nothing of runs."""
