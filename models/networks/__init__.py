"""Denoising networks that serve rows with different plans in one forward."""
