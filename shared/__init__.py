"""What the front desk and the workshop agree on; it knows neither of them."""
