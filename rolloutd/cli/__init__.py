"""The `rolloutd` command."""
