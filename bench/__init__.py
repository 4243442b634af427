"""The benchmark suite, imported as ``fastebm.bench``. Its scripts run as ``python bench/NAME.py``.

A script's ``--help`` says what it does, how long it takes and what it writes. Results go to runs/, which git ignores;
``--out bench/results`` writes the committed files.

cases.py        what is run, as data
problem.py      the energy, start and sampler that a case's contestants share, and what a right answer is
contestants.py  the ways to run it: what people write, peers, and fastebm
clock.py        interleaved runs, medians and quartiles
limits.py       the most that the machine could do, measured in the same rounds
race.py         gate, clock, rows: the steps of chains
training.py     a training step with persistent chains      efficiency.py  effective samples per second
sampling.py     effective samples per second of samplers: sampling_contestants.py on sampling_targets.py
sampling_parts.py  where the time of their steps goes
pool.py         draws, write-backs and memory of large pools
compilation.py  first calls, and those of a second process  micro.py       single operations (pytest-benchmark)
breakdown.py    where the time of the default call goes
partition.py    errors of log_partition, where log Z is known
run.py          the command: cases -> contestants -> clock -> rows
rows.py         result files, --out
tables.py       tables from result files, with tables_cpu.py, tables_gpu.py and markdown.py; plot.py: figures
trajectories.py the figure of docs/samplers.md
resources.py    registers, shared memory and instructions of compiled kernels, without a GPU
machine_code.py counts the instructions of a step, for resources.py
gpu.py          a visit to a GPU (on_gpu.sh): gpu_visit.py its stages, gpu_workers.py its processes, launches.py
                its kernels one by one, gpu_tests.py its tests
recipes.py      the training recipes, from data to measures
"""
