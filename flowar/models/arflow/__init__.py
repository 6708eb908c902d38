"""ARFlow (arXiv:2501.16085): autoregressive flow with hybrid linear attention over a sequence of images."""
