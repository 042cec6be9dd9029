"""The loop: budgets, steps, traces."""
