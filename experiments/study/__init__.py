"""Ablation study of rDPO, on digits that a model misnames because of a language prior.

Read `testbed` (the fixed settings), `arms` (the compared methods), `runs` (the jobs), `analysis`
and `page` (the results). `python -m experiments.study` repeats it.
"""
