"""The process and who started it: progress, signals, the cores it may use."""
