"""Sweeps: which runs they are made of, where those stand, and what launches them."""
