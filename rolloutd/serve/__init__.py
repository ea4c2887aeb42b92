"""The daemon: protocol, front, engine process, client."""
