"""Submit and follow Slurm jobs. This package imports flowar, but flowar never imports it."""
