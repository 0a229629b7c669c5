"""The front desk: the HTTP service that takes jobs and gives out results."""
