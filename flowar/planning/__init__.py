"""Predict what a run takes on machines that you don't have: operations, machines, engines, steps, runs."""
