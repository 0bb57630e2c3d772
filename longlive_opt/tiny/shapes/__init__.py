"""Moving Shapes: scenes of coloured shapes that move, their prompts, their frames, and their evaluation."""
