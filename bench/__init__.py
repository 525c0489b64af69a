"""Time and memory against peers, and what more GPUs would give."""
