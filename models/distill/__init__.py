"""Distilling a guidance student."""
