"""What every other folder builds on: errors, files, hashes, seeds, processes, claims, pictures. Imports only itself."""
