"""Pipeline from images with true responses to dual-preference pairs: `python -m realign.pairs`."""
