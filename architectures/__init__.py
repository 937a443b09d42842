"""What each family of models is: data, not code."""
