"""Sweeps: the runs that they are made of, how far each is, and what launches them."""
