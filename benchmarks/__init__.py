"""The benchmark suite: `python -m benchmarks --help`. From a case to the table, read cases.py,
measure.py, report.py, cli.py.
"""
