"""Infill: masked responses completed on another image, with the unmasked tokens forced."""
