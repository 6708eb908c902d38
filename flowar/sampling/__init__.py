"""Draw images with any number of processes: the folder of samples, the work, the pictures, other output formats."""
