"""Engines turn requests into outcomes; `protocol` is the seam, the rest are implementations."""
