"""The study: what of rDPO helps, on digits that a language prior makes a model misname.

Read `testbed` (what is fixed), `arms` (what is compared), `runs` (how), `analysis` and `report`
(what came out). `python -m experiments.study` repeats it.
"""
