"""The process and who started it: progress, signals, the device and cores it may use. It knows no room."""
