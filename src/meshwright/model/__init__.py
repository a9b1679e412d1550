"""What is to be trained."""
