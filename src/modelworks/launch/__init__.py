"""Puts a run on an engine: this machine (`launch.local`), Slurm, Kubernetes, Ray (`launch.engines`)."""
