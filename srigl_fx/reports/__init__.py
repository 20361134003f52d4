"""What the verbs say, as text and as pages."""
