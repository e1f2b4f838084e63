"""Benchmarks: pytest-benchmark suites over one registry of cases, with peers in the same run.

`make bench` times everything and rewrites page and tables; bench/README.md tells how to time a part and what a row
means.
"""
