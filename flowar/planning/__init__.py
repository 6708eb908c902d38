"""What a run would take on machines that aren't there: operations, machines, engines, steps, runs."""
