"""The benchmarks behind `dtlctl bench`. They measure the other rooms and change nothing."""
