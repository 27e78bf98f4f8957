"""The shipped recipes, one YAML each."""
