"""Diagnostics of a sampling result: statistics of its chains, and warnings where they would mislead.

diagnose.py     fastebm.diagnose and its result
draws.py        the states to diagnose, and cheap statistics of all coordinates, which find those that mix worst
statistics.py   ESS, R-hat and MCSE of these, by arviz-stats
step_bias.py    the step-size bias of Langevin dynamics, from the acceptance of a Metropolis test
modes.py        chains that stay in separate regions
advice.py       the warnings
"""
