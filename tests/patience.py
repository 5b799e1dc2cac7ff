"""How long tests wait for something that may hang."""

HANGS = 1200
"""Seconds. Nothing takes as long on a busy machine, and what hangs takes longer, ranks that wait for each other too."""
