"""The driver: it checks a call, picks what runs, runs it, and looks at what came back.

arguments.py, settings.py   what a call is given
run.py                      any sampler, on chains that have numbers and lifetime steps of their own
langevin_sample.py          Langevin by keywords
info.py                     what a call did
"""
