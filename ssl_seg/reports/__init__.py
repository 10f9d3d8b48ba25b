"""Pages and terminal tables about runs and studies."""
