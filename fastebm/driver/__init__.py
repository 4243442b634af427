"""The driver: checks the arguments of a sampling call, chooses a backend, runs it, and handles non-finite chains.

sample.py                   fastebm.sample: any sampler, with warm-up, thinning and resuming
langevin_sample.py          fastebm.langevin_sample: Langevin dynamics with its settings as keywords
parts.py, result.py         its steps in parts, and its result
run.py                      run_chains: K steps of any sampler on given chains; the calls above and pools use it
start.py                    the chains that a call starts from
arguments.py, settings.py   checks of single arguments; the run's options as one object
info.py                     SampleInfo, the report of a call
"""
