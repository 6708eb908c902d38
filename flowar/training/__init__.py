"""Training: set-up, the step, the engines, averages, checkpoints, reports."""
