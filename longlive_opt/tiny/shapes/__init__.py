"""Moving Shapes: coloured shapes that move: scenes, their prompts, their frames, and what frames show."""
