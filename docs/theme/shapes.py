"""Griffe extension: shapes of tensors, which are comments in the source, appear in docstrings."""

from __future__ import annotations

import re

import griffe


class Shapes(griffe.Extension):
    """Adds the comments beside parameters and fields, such as `hidden: Tensor,  # (N, H)`."""

    def on_function(self, *, func: griffe.Function, **_) -> None:
        """Add a paragraph "Shapes" to the docstring of a function."""
        if func.docstring is None:
            return
        signature = "\n".join(func.lines).partition('"""')[0]
        shapes = re.findall(r"(?m)^ +(\w+): .*,  # (.+)$", signature)
        shapes += [("result", shape) for shape in re.findall(r"(?m)^\) -> .*:  # (.+)$", signature)]
        if shapes:
            summary, *rest = func.docstring.value.split("\n\n", 1)
            listed = "; ".join(f"{name} `{shape}`" for name, shape in shapes)
            func.docstring.value = "\n\n".join([summary, f"Shapes: {listed}.", *rest])

    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        """Add a section "Attributes" to the docstring of a class whose fields have comments."""
        if cls.docstring is None or "\nAttributes:" in cls.docstring.value:
            return
        comments = [
            f"    {name}: {comment[1]}"
            for name, field in cls.attributes.items()
            if field.docstring is None
            and (comment := re.search(r"  # (.+)$", "\n".join(field.lines)))
            and not name.startswith("_")
        ]
        if comments:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(comments)
