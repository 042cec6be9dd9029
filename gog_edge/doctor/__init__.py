"""What this box has, what a bundle needs, and the command for what is missing."""
