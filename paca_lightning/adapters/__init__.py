"""What leaves the process: adapter directories, checkpoints, exports."""
