"""Decoders as functions of weights and inputs, and the registry that picks one."""
