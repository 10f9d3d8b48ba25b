"""The guard against images that are both trained on and scored."""
