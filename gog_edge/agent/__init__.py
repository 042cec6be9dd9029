"""The episode loop: actions, budgets, events and traces."""
