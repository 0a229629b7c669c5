"""How right a model is: metrics on labels, agreement with another model's outputs, and how sure each figure is."""
