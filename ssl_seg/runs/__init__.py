"""The run folder: how it is written, locked, read and described."""
