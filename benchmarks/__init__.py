"""What `rolloutd bench` runs: models of real shapes with random weights, workloads, peers, limits, and reports."""
