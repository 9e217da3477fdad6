"""Figures from arrays: nothing here needs torch or timm."""
