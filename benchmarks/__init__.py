"Speed, memory and published-mix studies; `python -m benchmarks` prints the speed and memory tables."
