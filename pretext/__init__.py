"""The pretext tasks, one a file: `tasks: {denoise: {}}` finds denoise.py here."""
