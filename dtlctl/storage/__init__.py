"""Files: checkpoints, finished parts, the lock of a folder. Whole or not at all, whatever happens. It knows no room."""
