"""Infill: masked responses completed on another image, with the rest forced."""
