"""Making datasets: schema.py says what they hold, encode.py writes them."""
