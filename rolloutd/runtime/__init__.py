"""COMPUTES: a batch to sampled tokens, with torch. Never changes a sequence, knows no socket."""
