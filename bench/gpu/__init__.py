"""The GPU suites: `python -m bench.gpu`, or all of `make gpu`; bench/README.md says what is timed and how."""
