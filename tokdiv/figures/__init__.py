"""Figures from arrays: neither torch nor timm is needed to draw them."""
