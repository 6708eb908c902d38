"""What `flowar prepare` accepts at most: far above what real images and labels are, far below what fills a machine."""

LARGEST_IMAGE = 100_000_000  # pixels; in memory 3 bytes each, and twice that while it is converted
LARGEST_ASPECT = 50  # long side / short side: an image is resized before it is cropped, and a line would get huge
MOST_CLASSES = 100_000  # ImageNet-21k has 21,841; a larger class number is more likely no class number
