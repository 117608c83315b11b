"""Puts a run on an engine: today this machine (`launch.local`)."""
