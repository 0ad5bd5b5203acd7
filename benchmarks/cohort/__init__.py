"""A cohort rehearsed: hundreds of small slides on a real Slurm while faults are injected.

    python -m benchmarks.cohort --slides 599 --seed 1 --folder rehearsal

``slides`` makes them, ``cluster_run`` submits and submits again, ``faults`` kills and fills and
takes away, ``judge`` compares with an undisturbed run, ``projection`` says what a real one costs.
"""
