"""Griffe extension: the shapes of tensors, comments in a signature, appear in the docstring."""

from __future__ import annotations

import re

import griffe


class Shapes(griffe.Extension):
    """Adds a paragraph to a docstring: `hidden: Tensor,  # (N, H)` is "Shapes: hidden (N, H)."."""

    def on_function(self, *, func: griffe.Function, **_) -> None:
        """Change the docstring of one function."""
        if func.docstring is None or not func.lines:
            return
        summary, *rest = func.docstring.value.split("\n\n", 1)
        signature = "\n".join(func.lines).partition('"""')[0]
        shapes = re.findall(r"(?m)^ +(\w+): .*,  # (.+)$", signature)
        shapes += [("result", shape) for shape in re.findall(r"(?m)^\) -> .*:  # (.+)$", signature)]
        if shapes:
            listed = "; ".join(f"{name} `{shape}`" for name, shape in shapes)
            func.docstring.value = "\n\n".join([summary, f"Shapes: {listed}.", *rest])
