"""Online half: prepared dataset -> trained GPT, in an order that is a function."""
