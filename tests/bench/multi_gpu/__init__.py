"""The parts of `bench_multi_gpu`, one module each."""
