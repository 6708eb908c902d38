"""What only a cluster needs. It imports flowar, flowar never imports it; empty until jobs are submitted from here."""
