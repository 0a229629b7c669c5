"""Burnish for its users: the Python client, the `burnish` command, and local mode."""
