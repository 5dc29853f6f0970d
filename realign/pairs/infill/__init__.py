"""Infill: completes masked responses on another image, with the unmasked tokens forced."""
