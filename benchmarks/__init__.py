"""The comparisons behind results/README.md. Run them through ../benchmark.sh or with `python -m benchmarks`."""
