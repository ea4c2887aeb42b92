"""Checkpoint and trainer names to packed parameters; versions, digests, LoRA and the transports."""
