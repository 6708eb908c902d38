"""Making datasets: flowar/latents/schema.py says what they hold, encode.py writes them."""
