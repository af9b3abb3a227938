"""The benchmark suite: `python -m benchmarks --help`. To follow a case to its table, read cases/,
measure.py, report.py and cli.py.
"""
