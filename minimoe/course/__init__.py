"""What the lessons share: the style of figures, small tasks."""
