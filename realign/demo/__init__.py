"""The main job end to end on the shipped digits: `python -m realign.demo`."""
