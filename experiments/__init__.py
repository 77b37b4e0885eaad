"""One file per paper result: config, mesh, keys, pipeline, loss and loop. `python -m experiments` prints the cards."""
