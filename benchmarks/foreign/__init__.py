"""Networks that nobody here trained: what the service delivers of them, beside what a good engineer writes by hand."""
