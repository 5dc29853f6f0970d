"""Ablation study of rDPO on images that a model misnames because of a language prior.

`testbed` has the fixed settings, `arms` the compared methods, `runs` the jobs, and `analysis` and
`page` the results. `python -m experiments.study` repeats the study.
"""
