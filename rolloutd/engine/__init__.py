"""DECIDES which tokens of which sequences run next. No torch, but in engine.py, which joins both halves."""
