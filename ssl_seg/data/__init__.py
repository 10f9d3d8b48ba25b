"""Images on their way to a batch: which there are, how they are read, and how they are varied."""
