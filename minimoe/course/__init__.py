"""What the lessons share: the style of figures, the shapes of drawings, small tasks, plans of runs."""
