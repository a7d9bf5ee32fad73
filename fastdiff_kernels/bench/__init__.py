"""What `fastdiff bench` makes of measured rows: tables, figures, and comparisons of two runs. `pytest benchmarks` measures them."""
