"""Int8 in the form that each runtime runs well, with float where int8 loses too much, chosen by measurement."""
