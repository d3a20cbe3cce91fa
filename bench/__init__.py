"""The demo (`python -m bench.demo`) and the benchmark (`python -m bench.run`)."""
