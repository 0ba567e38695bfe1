"""The cloud oracle: asked over HTTP or by a solver, paid once, under limits."""
