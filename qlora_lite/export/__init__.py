"""Write a trained adapter in the forms that other programs read, and prove that each form works."""
