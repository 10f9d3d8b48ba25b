"""Studies: many runs planned, executed and kept account of."""
